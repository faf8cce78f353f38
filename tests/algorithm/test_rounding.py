"""The hash behind stochastic rounding is as good as random, and rounding with it is unbiased. All deterministic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppsf_dist.algorithm import rounding

COUNT = 1 << 16
SIGMAS = 5.0
"""Bound of a statistic in its standard deviations. Nothing here is drawn anew, so a pass stays a pass."""

LARGEST = torch.finfo(torch.bfloat16).max


def bits(*, seed: int = 0, step: int = 1, parameter: int = 0, count: int = COUNT) -> Tensor:
    """The 32 bits of each element, as the passes make them."""
    key = rounding.keys(seed, torch.tensor([step]), torch.tensor([parameter]))
    return rounding.mix_(torch.arange(count, dtype=torch.int32).bitwise_xor_(key))


def planes(values: Tensor) -> Tensor:
    """``(32, n)``: each bit as +1 or -1."""
    place = torch.arange(32, dtype=torch.int32).view(-1, 1)
    return (values.bitwise_right_shift(place) & 1).double() * 2 - 1


def round_(x: Tensor, **where: int) -> Tensor:
    return rounding.round_half_(x.clone(), rounding.high_half(bits(count=x.numel(), **where)))


@pytest.mark.parametrize("where", [{}, {"step": 1000}, {"seed": 12345}, {"parameter": 77}, {"seed": -1}])
def test_every_bit_is_balanced(where: dict[str, int]) -> None:
    assert float(planes(bits(**where)).mean(1).abs().max()) < SIGMAS / math.sqrt(COUNT)


@pytest.mark.parametrize("distance", [1, 2, 11, 64, 768, 4096])
def test_neighbours_are_uncorrelated(distance: int) -> None:
    """Also every bit of one element against every bit of the other."""
    signs = planes(bits())
    correlation = signs[:, distance:] @ signs[:, :-distance].T / (COUNT - distance)
    assert float(correlation.abs().max()) < SIGMAS / math.sqrt(COUNT - distance)


def test_y_and_z_are_uncorrelated() -> None:
    values = bits()
    y, z = rounding.high_half(values).double(), rounding.low_half(values).double()
    assert 0 <= int(y.min()) and int(y.max()) <= 65535
    assert abs(float(torch.corrcoef(torch.stack((y, z)))[0, 1])) < SIGMAS / math.sqrt(COUNT)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"seed": 2**31}, {"step": 2}, {"step": 2**20}, {"parameter": 1}, {"parameter": 500}]
)
def test_other_seeds_steps_and_parameters_draw_other_numbers(other: dict[str, int]) -> None:
    one, two = planes(bits()), planes(bits(**other))
    assert float((one * two).mean(1).abs().max()) < SIGMAS / math.sqrt(COUNT)


def test_keys_of_a_run_are_distinct() -> None:
    step = torch.arange(1, 301).repeat_interleave(100)
    parameter = torch.arange(100).repeat(300)
    keys = torch.cat([rounding.keys(seed, step, parameter) for seed in (0, 1)]).tolist()
    # Of n random 32-bit numbers about n^2 / 2^33 meet; that is 0.4 here.
    assert len(keys) - len(set(keys)) <= 3


def test_upper_halves_are_spread_evenly() -> None:
    counts = torch.bincount(rounding.high_half(bits()).bitwise_right_shift(8).long(), minlength=256).double()
    expected = COUNT / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < SIGMAS * math.sqrt(2 * 255)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("base", [1.0, -3.0, 2.0**-60])
def test_the_mean_is_what_was_rounded(base: float, fraction: float) -> None:
    unit = 2.0**-7 * 2.0 ** math.floor(math.log2(abs(base)))
    x = torch.full((COUNT,), base + math.copysign(fraction * unit, base))
    error = (round_(x).double() - x.double()) / unit
    deviation = math.sqrt(fraction * (1 - fraction) / COUNT)
    # fp32 holds the fraction itself to 2^-16 of a unit.
    assert abs(float(error.mean())) < SIGMAS * deviation + 2**-16
    assert float(error.abs().max()) < 1


def test_the_error_is_less_than_one_unit_and_exact_values_stay() -> None:
    x = torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
    rounded = round_(x)
    assert torch.equal(rounded, rounded.bfloat16().float())
    unit = torch.exp2(torch.frexp(x).exponent.float() - 8)
    assert bool(((rounded - x).abs() < unit).all())
    assert 0.4 < float((rounded.abs() > x.abs()).float().mean()) < 0.6
    assert torch.equal(round_(rounded, step=2), rounded)


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_and_nan_stay_and_finite_values_stay_finite(sign: int) -> None:
    infinite = torch.full((1000,), sign * math.inf)
    assert torch.equal(round_(infinite), infinite)
    # This NaN plus a carry would be -0.
    pattern = 0x7FFFFFFF if sign > 0 else -1
    assert bool(round_(torch.full((1000,), pattern, dtype=torch.int32).view(torch.float32)).isnan().all())
    largest = torch.full((1000,), sign * torch.finfo(torch.float32).max)
    assert torch.equal(round_(largest), torch.full((1000,), sign * LARGEST))
    assert bool(round_(largest).bfloat16().isfinite().all())
