"""Accelerate: see ``docs/trainers/accelerate.md``. A loop of one's own needs ``averaged`` and little else."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ppsf_dist.evaluation import innermost
from ppsf_dist.extras import missing
from ppsf_dist.integrations.modes import step_sizes
from ppsf_dist.optimizers.base import DistributedOptimizer

try:
    from accelerate.scheduler import AcceleratedScheduler
except ModuleNotFoundError as error:
    raise missing(error, "accelerate") from error

__all__ = ["check_prepared", "step_sizes"]


def check_prepared(*prepared: Any, schedule: bool = False) -> None:
    """Refuse what Accelerate has prepared and what does not train as it was meant.

    Args:
        prepared: what ``accelerator.prepare`` has returned; models and data loaders are left alone.
        schedule: allow a scheduler, for instance for an optimizer without an average.

    Raises:
        TypeError: there is an optimizer of somebody else (DeepSpeed builds the one that its config names in place of a
            ``DummyOptim``), or none at all.
        ValueError: there is a scheduler.
    """
    optimizers = [one for one in prepared if isinstance(one, Optimizer)]
    if not optimizers:
        raise TypeError("no optimizer is among what was prepared: give check_prepared() what prepare() has returned")
    for one in optimizers:
        inner = innermost(one)
        if not isinstance(inner, DistributedOptimizer):
            raise TypeError(
                f"the optimizer that trains is a {type(inner).__name__}, none of ppsf_dist: prepare one of its "
                'classes, or name one as "optimizer" in the DeepSpeed config (import ppsf_dist.deepspeed first)'
            )
    if not schedule and any(isinstance(one, AcceleratedScheduler) for one in prepared):
        raise ValueError(
            "a scheduler was prepared, which multiplies the step size that the optimizer finds: leave it out, or "
            "check_prepared(..., schedule=True) if you mean it"
        )
