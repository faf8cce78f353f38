"""The direction of a step and its variants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppsf_dist.algorithm import direction


def test_quotients_overwrite_the_denominator() -> None:
    numerator = torch.tensor([1.0, -2.0, 0.0])
    denominator = torch.tensor([1.0, 3.0, 0.0])
    assert direction.divide_(denominator, numerator, torch.tensor(1.0)) is denominator
    assert denominator.tolist() == [0.5, -0.5, 0.0]
    bounded = torch.tensor([0.0, 0.0])
    direction.atan2_(bounded, torch.tensor([5.0, -1e30]))
    assert bounded.tolist() == pytest.approx([2, -2], rel=1e-6)


def test_signs() -> None:
    a, b = torch.tensor([2.0, -3.0, 0.0]), torch.tensor([-5.0, -1.0, 4.0])
    assert direction.aligned(a, b).tolist() == [0, 1, 0]
    assert direction.grams_momentum(a, b).tolist() == [5, -1, 0]
    assert direction.focus(a, b, torch.zeros(3)).tolist() == pytest.approx([0.9, -1.1, 0.1])


def test_scales() -> None:
    numel = torch.tensor([4.0, 4.0, 1e6], dtype=torch.float64)
    assert direction.mask_scale(torch.tensor([4.0, 1.0, 0.0]).double(), numel).tolist() == pytest.approx([1, 4, 1000])
    squares = torch.tensor([1.0, 64.0], dtype=torch.float64)
    assert direction.soft_rms_scale(squares, numel[:2]).tolist() == pytest.approx([1, 0.5])


def orthogonal(u: Tensor, w: Tensor) -> Tensor:
    uu, ww, wu = (torch.dot(*pair).reshape(1) for pair in ((u, u), (w, w), (w, u)))
    keep, pull = direction.orthogonal_scales(uu, ww, wu, torch.tensor([u.numel()]))
    return keep * u - pull * w


def test_orthograd_turns_the_direction_and_keeps_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    u, w = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    turned = orthogonal(u, w)
    assert abs(float(turned @ w)) <= 1e-12 * float(u.norm() * w.norm())
    assert math.isclose(float(turned.norm()), float(u.norm()), rel_tol=1e-12)


@pytest.mark.parametrize("w", [[0.0, 0.0], [2.0, 4.0]])
def test_orthograd_leaves_what_has_no_orthogonal_part(w: list[float]) -> None:
    u = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.equal(orthogonal(u, torch.tensor(w, dtype=torch.float64)), u)
