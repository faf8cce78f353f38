"""Clipping by the norm of the whole gradient, on every layout that the optimizer knows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.sharding import Team, placement_of

EPSILON = 1e-6
"""Added to the norm before dividing by it, as in ``torch.nn.utils.clip_grad_norm_``."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale gradients in place so that the norm of all of them together is at most ``max_norm``.

    Equal to ``torch.nn.utils.clip_grad_norm_`` on one process, for every placement of the parameters: plain tensors and
    DTensors together, several meshes, copies (counted once), uneven and empty shards. One all-reduce, no waiting for
    the device. Every rank that holds a piece of the parameters must call it, with the same parameters in the same
    order; those without a gradient count as zero.

    Args:
        parameters: a parameter or several; all of them, with or without a gradient.
        max_norm: the largest norm that remains.
        norm_type: the p of the norm; ``float("inf")`` for the largest element.
        error_if_nonfinite: raise if the norm is not finite (waits for the device). Otherwise gradients become zero or
            NaN then, as with torch, and the optimizer of this package skips the step.
        process_group: ranks that share the norm, where a rank holds no piece of some parameters (pipeline stages).

    Returns:
        The norm before clipping, a plain fp32 tensor without dimensions, equal on every rank.

    Raises:
        ValueError: ``max_norm`` is negative, or ``norm_type`` is not positive.
        RuntimeError: the norm is not finite, and ``error_if_nonfinite`` is set; gradients are as they were then.
        NotImplementedError: parameters of FSDP1; its own ``clip_grad_norm_`` method is the one for them.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm}: must be 0 or larger; float('inf') only measures the norm")
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type}: must be larger than 0; 2.0 and float('inf') are the usual ones")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not parameters:
        return torch.zeros(())
    placement = placement_of(parameters, process_group)
    gradients = placement.gradients(parameters)
    # The infinity norm is not defined for no element.
    owned = [g for g, owner in zip(gradients, placement.owners, strict=True) if owner and g is not None and g.numel()]
    norm = _norm(owned, float(norm_type), placement.team, parameters[0].device)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of all gradients is {float(norm)}, so they cannot be clipped: look for the "
            "cause, or pass error_if_nonfinite=False, and the optimizer skips such a step"
        )
    scale = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    for device, here in _by_device([gradient for gradient in gradients if gradient is not None]).items():
        torch._foreach_mul_(here, scale.to(device))
    return norm


def _norm(owned: Sequence[Tensor], p: float, team: Team, device: torch.device) -> Tensor:
    """The norm of all gradients, equal on every rank, from those that this rank counts."""
    norms = [
        torch.stack(torch._foreach_norm(gradients, p, dtype=torch.promote_types(gradients[0].dtype, torch.float32)))
        for same_dtype in _by_dtype(owned)
        for gradients in _by_device(same_dtype).values()
    ]
    norms = [n.to(device=device, dtype=torch.float64) for n in norms]
    if p == math.inf:
        # Each rank has a place of its own, so that the largest comes out of a sum.
        places = torch.zeros(max(1, len(team.ranks)), dtype=torch.float64, device=device)
        if norms:
            places[team.ranks.index(dist.get_rank()) if team.ranks else 0] = torch.cat(norms).max()
        team.sum_(places)
        return places.max().float()
    total = torch.cat(norms).pow(p).sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    team.sum_(total)
    return total.pow(1 / p).float()


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[t for t in tensors if t.dtype == dtype] for dtype in dict.fromkeys(t.dtype for t in tensors)]


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    return {device: [t for t in tensors if t.device == device] for device in dict.fromkeys(t.device for t in tensors)}
