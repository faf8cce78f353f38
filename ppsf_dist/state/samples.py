"""Which elements of a parameter are sampled, and which of them lie in a shard."""

from __future__ import annotations

import torch
from torch import Tensor

from ppsf_dist.algorithm.step_size import SLICE
from ppsf_dist.sharding import Box, Shard


def sample_indices(box: Box) -> Tensor:
    """Positions in a box (in its order) of the elements whose logical index is a multiple of 11."""
    if box.is_flat:
        return torch.arange(count_in(box)) * SLICE + -box.flat_start % SLICE
    return (box.flat_index() % SLICE == 0).nonzero().view(-1)


def sample_count(shard: Shard) -> int:
    """How many elements of a shard are sampled."""
    return sum(count_in(box) for box in shard.boxes)


def count_in(box: Box) -> int:
    """How many elements of a box are sampled."""
    return len(range(-box.flat_start % SLICE, box.numel, SLICE)) if box.is_flat else len(sample_indices(box))


def samples_of(shard: Shard, local: Tensor) -> Tensor:
    """Every 11th element of the logical parameter, as far as it lies in this shard."""
    parts = [
        # Of what lies evenly no index has to reach the device.
        view.reshape(-1)[-box.flat_start % SLICE :: SLICE]
        if box.is_flat
        else view.reshape(-1)[sample_indices(box).to(local.device)]
        for box, view in zip(shard.boxes, shard.views(local), strict=True)
    ]
    return torch.cat(parts) if parts else local.new_empty(0)
