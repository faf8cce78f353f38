"""What happens around the step of a wrapped optimizer: what it must know first, and the moves between y, z and x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm import averaging
from ppsf_dist.refusals import refuse_gradient
from ppsf_dist.sharding import Placement, Shard, together

PREFIX = "wrapper_"
"""Of what the wrapper keeps in the groups, so that it meets nothing of the base optimizer's (``k`` of Prodigy)."""
MOMENTUM, DECAY_AT_Y = PREFIX + "momentum", PREFIX + "weight_decay_at_y"


def look_at_gradients(
    placement: Placement, params: Sequence[Tensor], failure: Exception | None = None
) -> tuple[bool, bool]:
    """Whether any rank has a gradient, and whether all of them are finite. Waits for the device.

    Args:
        placement: of the parameters.
        params: all of them.
        failure: why this rank cannot step, if it cannot.

    Raises:
        Exception: some rank has failed, or has a gradient that cannot be stepped (``ValueError``); all raise then.
    """
    gradients = placement.gradients(params)
    flags = torch.zeros(3, dtype=torch.float64, device=params[0].device)
    unfit = failure
    flags[2] += failure is not None
    for index, (gradient, p) in enumerate(zip(gradients, params, strict=True)):
        if gradient is None:
            continue
        try:
            refuse_gradient(gradient, placement.shards[index].local(p).shape, f"parameter {index}")
        except ValueError as error:
            unfit = unfit or error
            flags[2] += 1
            continue
        flags[0] += 1
        if gradient.numel():
            largest = torch.linalg.vector_norm(gradient, math.inf).float()
            flags[1] += ~largest.square().isfinite()
    placement.team.sum_(flags, why="whether gradients are finite")
    any_gradient, bad, refused = flags.tolist()
    if refused:

        def fail() -> None:
            if unfit is not None:
                raise unfit

        together(placement.team, fail)
    return any_gradient > 0, bad == 0


def to_base(group: dict[str, Any], lr: float, weights: Sequence[Tensor], z: Sequence[Tensor]) -> None:
    """Decay at y, then let the parameters hold z, and what held z the average x."""
    beta, decay = group[MOMENTUM], lr * group[DECAY_AT_Y]
    for p, other in zip(weights, z, strict=True):
        if decay:
            other.sub_(p, alpha=decay)
            p.sub_(p, alpha=decay * (1 - beta))
        p.lerp_(other, averaging.train_to_eval_weight(beta))
        _swap(p, other)


def from_base(group: dict[str, Any], c: float, weights: Sequence[Tensor], x: Sequence[Tensor]) -> None:
    """The new average, with a share ``c`` of z, and back to y."""
    for p, other in zip(weights, x, strict=True):
        _swap(p, other)
        p.lerp_(other, c)
        p.lerp_(other, averaging.eval_to_train_weight(group[MOMENTUM]))


def _swap(one: Tensor, other: Tensor) -> None:
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


def like(shard: Shard, name: str, value: Tensor) -> Tensor:
    """A tensor of a checkpoint, which lies in any way, as one that lies like the parameter."""
    if tuple(value.shape) != tuple(shard.shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not {shard.shape}: it is another model's")
    spread: Tensor = shard.spread(shard.extract(value).to(shard.param.device).clone())
    return spread


def spread(shard: Shard, value: Any) -> Any:
    """An entry of the base's state: what has the parameter's shape lies like the parameter."""
    is_like = isinstance(value, Tensor) and shard.shape and tuple(value.shape) == tuple(shard.shape)
    return like(shard, "", value) if is_like else deepcopy(value)
