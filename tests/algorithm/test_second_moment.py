"""Factoring, moving averages and RAdam's rectification."""

from __future__ import annotations

import pytest
import torch

from ppsf_dist.algorithm.second_moment import ema_, ema_low_precision, factoring, radam, row_scale


@pytest.mark.parametrize("shape", [(), (64,), (31, 31), (0, 64)])
def test_what_is_not_factored(shape: tuple[int, ...]) -> None:
    assert factoring(shape) is None


@pytest.mark.parametrize(
    ("shape", "dr", "dc"), [((32, 2), 0, 1), ((2, 32), 1, 0), ((40, 40), 1, 0), ((64, 3, 3), 0, 2), ((8, 64, 16), 1, 2)]
)
def test_the_two_largest_axes_are_averaged(shape: tuple[int, ...], dr: int, dc: int) -> None:
    found = factoring(shape)
    assert found is not None and (found.dr, found.dc) == (dr, dc)
    assert found.row_shape[dr] == 1 and found.col_shape[dc] == 1
    assert found.mean_axis(quirks=False) == dc
    assert found.mean_axis(quirks=True) == (dc - 1 if dc > dr else dc)


def test_moving_averages_agree_where_nothing_is_rounded() -> None:
    beta2, weight, square = torch.tensor(0.5), torch.tensor(0.25), torch.tensor([8.0, 0.0])
    old = torch.tensor([4.0, 2.0])
    low = ema_low_precision(old.bfloat16(), beta2, weight, square)
    assert ema_(old, beta2, weight, square) is old
    assert old.tolist() == [4.0, 1.0] == low.tolist() and low.dtype == torch.bfloat16


def test_a_low_precision_moment_is_rounded_after_its_decay() -> None:
    old, beta2 = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor(1 - 2**-10)
    square = torch.tensor([2**-8 - 2**-12])
    # The decay alone is lost in rounding; rounded once, the sum would still stay below the middle to the next value.
    assert float((old.float() * beta2 + square).bfloat16()) == 1.0
    assert float(ema_low_precision(old, beta2, torch.tensor(1.5), square)) == 1 + 2**-7


def test_rows_are_scaled_by_their_mean() -> None:
    row = torch.tensor([1.0, 4.0, 7.0])
    assert torch.allclose(row_scale(row, row.mean()) ** 2, row / 4)
    assert bool(row_scale(torch.zeros(3), torch.zeros(())).eq(0).all())


def test_radam_waits_until_the_variance_is_tractable() -> None:
    k = torch.arange(1, 9, dtype=torch.float64)
    corrected, rectified = radam(k, torch.full_like(k, 0.999))
    assert rectified[:4].tolist() == [0] * 4 and bool((rectified[4:] > 0).all())
    # In the first step all of the average is the gradient.
    assert float(corrected[0]) == pytest.approx(0, abs=1e-9)
    _, late = radam(torch.tensor([1e6], dtype=torch.float64), torch.tensor([0.999], dtype=torch.float64))
    assert float(late) == pytest.approx(1)
