"""Which elements are sampled depends on the whole parameter alone, not on how it is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ppsf_dist.sharding import Box, Shard, flat_range
from ppsf_dist.state.samples import sample_count, sample_indices, samples_of

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


def shard_of(local: torch.Tensor, shape: tuple[int, ...], boxes: tuple[Box, ...]) -> Shard:
    return Shard(nn.Parameter(local), shape, boxes)


@settings(max_examples=60)
@given(shapes, st.sampled_from([1, 2, 8, 11]), st.data())
def test_slices_of_the_flattened_parameter_have_its_samples(
    shape: tuple[int, ...], slice_p: int, data: st.DataObject
) -> None:
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    cut = data.draw(st.integers(0, full.numel()))
    parts = []
    for start, stop in ((0, cut), (cut, full.numel())):
        boxes = tuple(flat_range(shape, start, stop - start))
        shard = shard_of(full[start:stop], shape, boxes)
        parts.append(samples_of(shard, shard.weights().detach(), slice_p))
        assert sample_count(shard, slice_p) == len(parts[-1])
    assert torch.equal(torch.cat(parts), full[::slice_p])


@settings(max_examples=60)
@given(shapes, st.sampled_from([1, 2, 8, 11]), st.data())
def test_columns_have_the_samples_that_lie_in_them(shape: tuple[int, ...], slice_p: int, data: st.DataObject) -> None:
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    cut = data.draw(st.integers(1, shape[-1]))
    seen = []
    for start, n in ((0, cut), (cut, shape[-1] - cut)):
        if n == 0:
            continue
        box = Box(shape, (*[0] * (len(shape) - 1), start), (*shape[:-1], n))
        local = full.narrow(-1, start, n).contiguous()
        shard = shard_of(local, shape, (box,))
        ours = samples_of(shard, local, slice_p)
        assert sample_count(shard, slice_p) == len(ours) == len(sample_indices(box, slice_p))
        assert torch.equal(local.reshape(-1)[sample_indices(box, slice_p)], ours)
        seen += ours.tolist()
    assert sorted(seen) == full.reshape(-1)[::slice_p].tolist()


def test_an_empty_shard_has_none() -> None:
    shard = shard_of(torch.empty(0), (4, 4), ())
    assert sample_count(shard, 11) == 0 and samples_of(shard, torch.empty(0), 11).shape == (0,)


@pytest.mark.parametrize("slice_p", [1, 11])
def test_a_single_element_is_the_first_sample(slice_p: int) -> None:
    shard = shard_of(torch.tensor(3.0), (), (Box((), (), ()),))
    assert samples_of(shard, torch.tensor(3.0), slice_p).tolist() == [3.0]
