"""Push the fp32 partitions to the weights that the model computes with. DeepSpeed does so only after its own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def _is_stage_3(param: Any) -> bool:
    return hasattr(param, "_z3_optimizer")


def _refresh_stage_1_or_2(flat: Tensor, param: Any) -> None:
    """The low-precision parameters of a group lie in one storage, cut into equal parts for the ranks."""
    everything = torch.empty(0, dtype=param.dtype, device=param.device).set_(param.data.untyped_storage())
    rank, ranks = dist.get_rank(param._dp_group), dist.get_world_size(param._dp_group)
    own = everything[: ranks * flat.numel()].view(ranks, flat.numel())[rank]
    own.copy_(flat)
    dist.all_gather_single(everything[: ranks * flat.numel()], own.clone(), group=param._dp_group)


def _refresh_stage_3(optimizer: Any) -> None:
    """What DeepSpeed does after its own step, and around its checkpoints."""
    # Small parameters stay gathered between steps: without this the model would go on with the old ones.
    optimizer._partition_all_parameters()
    for sub_group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    optimizer.invalidate_secondary_tensor()
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
