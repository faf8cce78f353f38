"""Whole tensors from slices. Collective over the ranks that share the parameter."""

from __future__ import annotations

import math

from torch import Tensor

from ppsf_dist.algorithm.step_size import SLICE
from ppsf_dist.deepspeed.shards import ZeroShard
from ppsf_dist.sharding import Team


def gather_elements(shard: ZeroShard, local: Tensor) -> Tensor:
    """The whole of a tensor that lies like the parameter, in its shape."""
    whole = local.new_zeros(shard.shape)
    shard.extract(whole).copy_(local)
    Team(shard.group).fill_(whole)
    return whole


def gather_samples(shard: ZeroShard, local: Tensor) -> Tensor:
    """The samples of the whole parameter, every 11th element of it."""
    whole = local.new_zeros(-(-math.prod(shard.shape) // SLICE))
    shard.extract_samples(whole).copy_(local)
    Team(shard.group).fill_(whole)
    return whole
