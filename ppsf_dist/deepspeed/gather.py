"""Whole tensors from slices. Collective over the ranks that share the parameter."""

from __future__ import annotations

import math

from torch import Tensor

from ppsf_dist.deepspeed.shards import ZeroShard
from ppsf_dist.sharding import Team


def gather_elements(shard: ZeroShard, local: Tensor) -> Tensor:
    """The whole of a tensor that lies like the parameter, in its shape."""
    whole = local.new_zeros(shard.shape)
    shard.extract(whole).copy_(local)
    Team(shard.group).fill_(whole)
    return whole


def gather_samples(shard: ZeroShard, local: Tensor, slice_p: int) -> Tensor:
    """The samples of the whole parameter."""
    whole = local.new_zeros(-(-math.prod(shard.shape) // slice_p))
    shard.extract_samples(whole, slice_p).copy_(local)
    Team(shard.group).fill_(whole)
    return whole
