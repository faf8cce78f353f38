"""Push the fp32 partitions to the weights that the model computes with. DeepSpeed does so only after its own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.deepspeed.shards import ZeroShard


@torch.no_grad()
def refresh_model(groups: Sequence[tuple[Tensor, Sequence[Any]]]) -> None:
    """Copy this rank's partitions into the model and gather those of the others. Collective.

    Args:
        groups: the flat tensor of each parameter group (any of them at stage 3) and its trained parameters.
    """
    stage_3 = {id(p._z3_optimizer): p._z3_optimizer for _, params in groups for p in params if _is_stage_3(p)}
    for optimizer in stage_3.values():
        _refresh_stage_3(optimizer)
    for flat, params in groups:
        if params and not _is_stage_3(params[0]):
            _refresh_stage_1_or_2(flat, params[0])


@torch.no_grad()
def show_late(shards: Sequence[ZeroShard]) -> None:
    """Copy partitions into the model that were written after DeepSpeed had done so, but has yet to gather others."""
    at_stage_3 = {id(shard.flat): shard for shard in shards if _is_stage_3(shard.param)}
    for shard in at_stage_3.values():
        optimizer: Any = shard.param._z3_optimizer  # type: ignore[attr-defined]
        sub_group = next(i for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat) if flat is shard.flat)
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    for shard in {id(shard.flat): shard for shard in shards if not _is_stage_3(shard.param)}.values():
        _own_part(shard.flat, shard.param).copy_(shard.flat)


def _is_stage_3(param: Any) -> bool:
    return hasattr(param, "_z3_optimizer")


def _refresh_stage_1_or_2(flat: Tensor, param: Any) -> None:
    own = _own_part(flat, param)
    own.copy_(flat)
    dist.all_gather_single(_everything(flat, param), own.clone(), group=param._dp_group)


def _everything(flat: Tensor, param: Any) -> Tensor:
    """The low-precision parameters of a group lie in one storage, cut into equal parts for the ranks."""
    storage = torch.empty(0, dtype=param.dtype, device=param.device).set_(param.data.untyped_storage())
    return storage[: dist.get_world_size(param._dp_group) * flat.numel()]


def _own_part(flat: Tensor, param: Any) -> Tensor:
    return _everything(flat, param).view(-1, flat.numel())[dist.get_rank(param._dp_group)]


def _refresh_stage_3(optimizer: Any) -> None:
    """What DeepSpeed does after its own step, and around its checkpoints."""
    # Small parameters stay gathered between steps: without this the model would go on with the old ones.
    optimizer._partition_all_parameters()
    for sub_group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    optimizer.invalidate_secondary_tensor()
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
