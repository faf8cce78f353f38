"""Mixture of experts at stage 0: whole tensors, but not the same ones on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from ppsf_dist.sharding import Shard, plain_shard


def shards_with_experts(params: Sequence[Tensor]) -> list[Shard]:
    """Shards of parameters some of which are experts.

    Every rank has the other parameters; an expert lives on the ranks of its expert-data-parallel group. The first rank
    of each counts its elements.
    """
    world = tuple(range(dist.get_world_size()))
    shards = []
    for param in params:
        shard = plain_shard(param)
        shard.domain = expert_ranks(param) if is_expert(param) else world
        shard.owner = dist.get_rank() == shard.domain[0]
        shard.copied = len(shard.domain) > 1
        shards.append(shard)
    return shards


def expert_ranks(param: Any) -> tuple[int, ...]:
    """The ranks that hold copies of an expert's parameter."""
    group = groups._get_expert_data_parallel_group(param.group_name)
    return tuple(dist.get_process_group_ranks(group))


def is_expert(param: Tensor) -> bool:
    """Whether DeepSpeed has marked a parameter as that of an expert."""
    return getattr(param, "allreduce", True) is False and hasattr(param, "group_name")
