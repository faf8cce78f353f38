"""Schedule-Free averaging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppsf_dist.algorithm.averaging import averaging_weight, eval_to_train_weight, train_to_eval_weight


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weights_are_shares_of_the_sum_of_squares() -> None:
    total = numbers(0)
    shares = []
    for delta in (1.0, 2.0, 3.0):
        c, q, total = averaging_weight(numbers(delta), total, numbers(0.9), numbers(0))
        shares.append(float(c))
        assert float(q) == pytest.approx(1 - 0.9 * (1 - float(c)))
    assert shares == pytest.approx([1, 4 / 5, 9 / 14])
    assert float(total) == 14


def test_without_a_step_nothing_is_averaged() -> None:
    c, _, total = averaging_weight(numbers(0), numbers(0), numbers(0.9), numbers(0))
    assert float(c) == 0 and float(total) == 0


def test_schedulefree_c_replaces_the_factor_and_never_exceeds_one() -> None:
    c, _, _ = averaging_weight(numbers(1, 1), numbers(99, 0), numbers(0.9, 0.9), numbers(50, 50))
    assert c.tolist() == pytest.approx([0.01 * 0.1 * 50, 1])


@pytest.mark.parametrize("beta1", [0.5, 0.9, 0.99])
def test_evaluation_and_back(beta1: float) -> None:
    y, z = 2.0, -3.0
    x = y + train_to_eval_weight(beta1) * (z - y)
    assert y == pytest.approx(beta1 * x + (1 - beta1) * z)
    assert x + eval_to_train_weight(beta1) * (z - x) == pytest.approx(y)
