"""The flat buffer of factored moments against Adafactor's formulas written out for one parameter at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppsf_dist.algorithm.second_moment import ROW_MEAN_GUARD, Factoring, factoring
from ppsf_dist.sharding import Box
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.writes import Writes

SHAPES = [(48, 64), (64, 48), (40, 40), (2, 64), (64, 1), (64, 32, 3, 3), (32, 64, 3, 3), (8, 32, 64)]


def axes_of(shape: tuple[int, ...]) -> Factoring:
    axes = factoring(shape)
    assert axes is not None
    return axes


def buffer(*shapes: tuple[int, ...], quirks: bool = False, dtype: torch.dtype = torch.float32) -> FactoredMoments:
    """With a parameter in front that is not factored."""
    return FactoredMoments([None, *((axes_of(shape), quirks, dtype) for shape in shapes)], torch.device("cpu"))


def sums_of(moments: FactoredMoments, squares: list[Tensor]) -> Tensor:
    sums = torch.zeros(len(moments))
    for placed, square in zip(moments.placed[1:], squares, strict=True):
        assert placed is not None
        sums[placed.row] = square.sum(placed.factoring.dr, keepdim=True).reshape(-1)
        sums[placed.col] = square.sum(placed.factoring.dc, keepdim=True).reshape(-1)
    return sums


def squares_of(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) + 0.1 for shape in shapes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_times_columns_are_adafactors_denominator(shape: tuple[int, ...]) -> None:
    """R / mean(R) times C, R the mean over the largest axis and C over the second largest."""
    moments, (square,) = buffer(shape), squares_of(shape)
    new = moments.updated(sums_of(moments, [square]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    factors = moments.factors(new)
    placed = moments.placed[1]
    assert placed is not None
    axes = placed.factoring
    ours = factors[placed.row].view(axes.row_shape) * factors[placed.col].view(axes.col_shape)
    row, col = square.mean(axes.dr, keepdim=True), square.mean(axes.dc, keepdim=True)
    expected = (row / (row.mean(axes.dc, keepdim=True) + ROW_MEAN_GUARD) * col).sqrt()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_parameters_do_not_touch_each_other() -> None:
    squares = squares_of(*SHAPES)
    together = buffer(*SHAPES)
    weights = torch.linspace(0.1, 1, len(SHAPES) + 1)
    new = together.updated(sums_of(together, squares), weights, 1 - weights)
    factors = together.factors(new)
    for index, shape in enumerate(SHAPES, start=1):
        alone, at = buffer(shape), together.placed[index]
        weight = weights[index : index + 1].expand(2)
        by_itself = alone.updated(sums_of(alone, [squares[index - 1]]), weight, 1 - weight)
        assert at is not None
        here = slice(at.row.start, at.col.stop)
        assert torch.equal(new[here], by_itself)
        torch.testing.assert_close(factors[here], alone.factors(by_itself), rtol=1e-6, atol=0)


def test_an_update_is_an_average_and_leaves_what_is_stored() -> None:
    moments, first, second = buffer((48, 64)), squares_of((48, 64)), squares_of((48, 64), seed=1)
    beta2 = torch.tensor([0.0, 0.9])
    moments.values.copy_(moments.updated(sums_of(moments, first), torch.zeros(2), torch.ones(2)))
    before = moments.values.clone()
    new = moments.updated(sums_of(moments, second), beta2, 1 - beta2)
    assert torch.equal(moments.values, before)
    mean = moments.updated(sums_of(moments, second), torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(new, 0.9 * before + 0.1 * mean, rtol=1e-6, atol=0)


def test_a_moment_in_bf16_is_rounded_as_it_would_be_stored() -> None:
    moments, squares = buffer((48, 64), dtype=torch.bfloat16), squares_of((48, 64))
    new = moments.updated(sums_of(moments, squares), torch.full((2,), 0.9), torch.full((2,), 0.1))
    assert torch.equal(new, new.bfloat16().float()) and bool((new > 0).all())


def test_the_references_mean_is_over_another_axis_of_a_tall_matrix() -> None:
    squares = squares_of((64, 48))
    ours, theirs = buffer((64, 48)), buffer((64, 48), quirks=True)
    new = ours.updated(sums_of(ours, squares), torch.zeros(2), torch.ones(2))
    placed = theirs.placed[1]
    assert placed is not None
    assert torch.equal(theirs.factors(new)[placed.row], torch.ones(48))
    assert not torch.equal(ours.factors(new)[placed.row], torch.ones(48))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rows_and_columns_of_a_box_are_a_strided_view(shape: tuple[int, ...]) -> None:
    """Filled from boxes, each at its own rows and columns, the buffer is that of the whole parameter."""
    moments, (square,) = buffer((40, 40), shape), squares_of(shape)
    placed = moments.placed[2]
    assert placed is not None
    sums = torch.zeros(len(moments))
    half = [max(1, n // 2) for n in shape]
    for corner in range(2 ** len(shape)):
        upper = [bool(corner >> axis & 1) for axis in range(len(shape))]
        offset = tuple(h if up else 0 for h, up in zip(half, upper, strict=True))
        size = tuple(n - h if up else h for n, h, up in zip(shape, half, upper, strict=True))
        if 0 in size:
            continue
        piece = square
        for axis, (start, n) in enumerate(zip(offset, size, strict=True)):
            piece = piece.narrow(axis, start, n)
        row, col = moments.strided(2, Box(shape, offset, size))
        for strided, axis in ((row, placed.factoring.dr), (col, placed.factoring.dc)):
            view = sums.as_strided(strided.size, strided.stride, strided.start)
            assert torch.equal(view.reshape(-1), sums[strided.index(sums.device).reshape(-1)])
            view.add_(piece.sum(axis, keepdim=True))
    expected = torch.cat([square.sum(axis).reshape(-1) for axis in (placed.factoring.dr, placed.factoring.dc)])
    torch.testing.assert_close(sums[placed.row.start : placed.col.stop], expected, rtol=1e-5, atol=0)
    assert float(sums[: placed.row.start].abs().sum()) == 0


def test_only_parameters_with_an_open_gate_are_written() -> None:
    moments = buffer((48, 64), (40, 40))
    Writes().put(lambda: moments.committed(torch.ones(len(moments)), torch.tensor([True, False, True])))
    first, second = moments.placed[1:]
    assert first is not None and second is not None
    assert not moments.values[first.row.start : first.col.stop].any()
    assert bool((moments.values[second.row.start : second.col.stop] == 1).all())


def test_without_factored_parameters_there_is_no_buffer() -> None:
    moments = FactoredMoments([None, None], torch.device("cpu"))
    assert len(moments) == 0 and moments.committed(torch.empty(0), torch.tensor([True, True])) == []
