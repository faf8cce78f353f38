"""What frameworks leave on tensors, modules and the stack, read without importing them."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

ENGINE_MODULE = "deepspeed.runtime.engine"
ENGINE = "DeepSpeedEngine"


def is_dtensor(param: Tensor) -> bool:
    """A DTensor, of FSDP2 or tensor parallelism."""
    return hasattr(type(param), "placements") and hasattr(type(param), "device_mesh")


def is_flat_parameter(param: Tensor) -> bool:
    """A flat slice of FSDP1."""
    return hasattr(param, "_fsdp_flattened")


def is_expert(param: Tensor) -> bool:
    """A parameter of an expert, which DeepSpeed does not reduce over all ranks."""
    return getattr(param, "allreduce", True) is False and hasattr(param, "group_name")


def are_partitioned(groups: Sequence[dict[str, Any]], given: Sequence[Sequence[Tensor]]) -> bool:
    """Groups in which ZeRO has put flat tensors in place of some parameters."""
    return any(
        hasattr(param, "_dp_group") or hasattr(param, "_z3_optimizer")
        for group, params in zip(groups, given, strict=True)
        if group["params"] is not params
        for param in params
    )


def are_copies(groups: Sequence[dict[str, Any]], given: Sequence[Sequence[Tensor]]) -> bool:
    """Groups that all hold fp32 copies of the trainable ones of the 16-bit parameters that they were made with."""
    return all(_is_copied(group["params"], params) for group, params in zip(groups, given, strict=True))


def _is_copied(copies: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    originals = [p for p in given if p.requires_grad and p.numel()]
    return len(originals) == len(copies) > 0 and all(
        type(copy) is Tensor and copy.shape == p.shape and copy.dtype == torch.float32 and p.element_size() == 2
        for copy, p in zip(copies, originals, strict=True)
    )


def is_engine(frame: FrameType) -> bool:
    """A method of a DeepSpeed engine that is running. Without ZeRO nothing about an optimizer or its tensors tells."""
    if frame.f_globals.get("__name__") != ENGINE_MODULE:
        return False
    return any(base.__name__ == ENGINE for base in type(frame.f_locals.get("self")).__mro__)


def keeps_gathered_weights(module: nn.Module) -> bool:
    """A module under ``fully_shard``."""
    return hasattr(type(module), "reshard") and hasattr(type(module), "unshard")
