"""Which elements of a parameter are sampled, and which of them lie in a shard.

Sampled are the elements whose index in the flattened logical parameter is a multiple of ``slice_p``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppsf_dist.sharding import Box, Shard


def sample_indices(box: Box, slice_p: int) -> Tensor:
    """Positions of the sampled elements in a box, in its order."""
    if box.is_flat:
        return torch.arange(count_in(box, slice_p)) * slice_p + -box.flat_start % slice_p
    return (box.flat_index() % slice_p == 0).nonzero().view(-1)


def sample_count(shard: Shard, slice_p: int) -> int:
    """How many elements of a shard are sampled."""
    return sum(count_in(box, slice_p) for box in shard.boxes)


def count_in(box: Box, slice_p: int) -> int:
    """How many elements of a box are sampled."""
    if slice_p == 1:
        return box.numel
    if box.is_flat:
        return len(range(-box.flat_start % slice_p, box.numel, slice_p))
    return len(sample_indices(box, slice_p))


def samples_of(shard: Shard, local: Tensor, slice_p: int) -> Tensor:
    """The sampled elements of the logical parameter, as far as they lie in this shard."""
    parts = [
        # Of what lies evenly no index has to reach the device.
        view.reshape(-1)[-box.flat_start % slice_p :: slice_p]
        if box.is_flat or slice_p == 1
        else view.reshape(-1)[sample_indices(box, slice_p).to(local.device)]
        for box, view in zip(shard.boxes, shard.views(local), strict=True)
    ]
    return torch.cat(parts) if parts else local.new_empty(0)
