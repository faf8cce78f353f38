"""What a parameter keeps under switches, and in which dtype."""

from __future__ import annotations

import pytest
import torch

from ppsf_dist.methods.switches import Switches
from ppsf_dist.state.inventory import TENSORS, needed, numbers_of

MATRIX, SMALL = (64, 48), (5, 5)


@pytest.mark.parametrize(
    ("switches", "shape", "names"),
    [
        (Switches(schedulefree=True), MATRIX, {"z"}),
        (Switches(schedulefree=False), MATRIX, {"exp_avg"}),
        (Switches(schedulefree=False, momentum=False, second_moment=True), MATRIX, {"exp_avg_sq"}),
        (Switches(schedulefree=True, second_moment=True), MATRIX, {"z", "exp_avg_sq"}),
        (
            Switches(schedulefree=True, second_moment=True, factored=True),
            MATRIX,
            {"z", "exp_avg_sq_row", "exp_avg_sq_col"},
        ),
        (Switches(schedulefree=True, second_moment=True, factored=True), SMALL, {"z", "exp_avg_sq"}),
        (Switches(schedulefree=True, statistics=True), SMALL, {"z", "p0", "s"}),
        (Switches(schedulefree=True, statistics=True, speed=True), SMALL, {"z", "p0"}),
    ],
)
def test_what_is_kept(switches: Switches, shape: tuple[int, ...], names: set[str]) -> None:
    assert {entry.name for entry in needed(switches, shape)} == names


@pytest.mark.parametrize(
    ("samples", "weights", "expected"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp32", torch.bfloat16, torch.float32),
        ("like weights", torch.float32, torch.float32),
        ("like weights", torch.bfloat16, torch.bfloat16),
        ("halved", torch.float32, torch.bfloat16),
        ("halved", torch.bfloat16, torch.bfloat16),
        ("halved", torch.float64, torch.float64),
    ],
)
def test_the_dtype_of_samples(samples: str, weights: torch.dtype, expected: torch.dtype) -> None:
    switches = Switches(schedulefree=True, statistics=True, samples=samples)  # type: ignore[arg-type]
    kept = {entry.name: entry.dtype(weights, switches) for entry in needed(switches, SMALL)}
    assert kept["p0"] == kept["s"] == expected and kept["z"] == weights


def test_names_are_told_once() -> None:
    assert len({entry.name for entry in TENSORS}) == len(TENSORS)


def test_the_numbers_of_a_parameter() -> None:
    assert numbers_of(Switches(schedulefree=True)) == ("step",)
    assert len(numbers_of(Switches(schedulefree=True, statistics=True))) == 4
