"""Boxes, and contiguous ranges of a flattened parameter as boxes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppsf_dist.sharding import flat_range
from ppsf_dist.sharding.geometry import Box, Shape

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Shape, int, int]:
    """A shape, the start of a range, and its length."""
    shape = draw(SHAPES)
    total = math.prod(shape)
    start = draw(st.integers(0, total))
    return shape, start, draw(st.integers(0, total - start))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    shape = draw(SHAPES)
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(shape, offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)))


@given(ranges())
def test_a_range_is_cut_into_its_elements_in_order(case: tuple[Shape, int, int]) -> None:
    shape, start, numel = case
    cut = flat_range(shape, start, numel)
    places = [int(i) for box in cut for i in box.flat_index()]
    assert places == list(range(start, start + numel))
    assert all(box.is_flat and box.numel for box in cut)
    # The end of a row, whole rows, the beginning of a row: on every axis but the last.
    assert len(cut) <= max(1, 2 * len(shape) - 1)


@given(ranges(), st.integers(1, 3))
def test_a_range_outside_of_the_parameter_is_refused(case: tuple[Shape, int, int], beyond: int) -> None:
    shape, start, _ = case
    with pytest.raises(ValueError, match=r"does not lie in a parameter of shape \("):
        flat_range(shape, start, math.prod(shape) - start + beyond)


@given(boxes())
def test_a_box_has_the_elements_that_indexing_has(box: Box) -> None:
    parameter = torch.arange(math.prod(box.shape)).view(box.shape)
    inside = parameter[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))].reshape(-1)
    assert torch.equal(box.flat_index(), inside)
    assert box.flat_start == int(inside[0])
    assert box.is_flat == (inside.tolist() == list(range(box.flat_start, box.flat_start + box.numel)))


@given(boxes(), st.integers(1, 40))
def test_tiles_cover_a_box_once_and_in_order(box: Box, limit: int) -> None:
    tiles = [box.narrow(start, size) for start, size in box.tiles(limit)]
    assert all(tile.numel <= limit for tile in tiles)
    assert not box.is_flat or all(tile.is_flat for tile in tiles)
    assert torch.equal(torch.cat([tile.flat_index() for tile in tiles]), box.flat_index())
