"""Mixture of experts at stage 0: whole tensors, but not the same ones on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from ppsf_dist.sharding import Shard, plain_shard


def shards_with_experts(params: Sequence[Tensor], beside: Sequence[Shard]) -> list[Shard]:
    """Shards of experts, and on which ranks the other parameters are.

    Every rank has the other parameters; an expert lives on the ranks of its expert-data-parallel group. The first rank
    of each counts its elements.
    """
    world = tuple(range(dist.get_world_size()))
    for shard in beside:
        shard.repeat(world)
    shards = [plain_shard(param) for param in params]
    for shard in shards:
        shard.repeat(expert_ranks(shard.param))
    return shards


def expert_ranks(param: Any) -> tuple[int, ...]:
    """The ranks that hold copies of an expert's parameter."""
    group = groups._get_expert_data_parallel_group(param.group_name)
    return tuple(dist.get_process_group_ranks(group))
