"""Evaluating with the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.sharding import drop_gathered_weights


@contextmanager
def averaged(optimizer: Any, model: nn.Module | None = None) -> Iterator[None]:
    """Evaluate with the averaged weights x, then go back to the training weights y, bit for bit.

    Args:
        optimizer: an optimizer of this package, something that wraps one (DeepSpeed's or Accelerate's
            optimizers), or any optimizer with ``train()`` and ``eval()`` that swap its parameters in place and keep
            ``train_mode`` in its groups.
        model: the model that it trains, for the names of its parameters in messages. FSDP2 keeps gathered copies of
            some weights between forward passes; with an optimizer of somebody else they are dropped only if the model
            is given.

    Already inside an evaluation (``optimizer.eval()`` was called), nothing is swapped.

    Raises:
        TypeError: the optimizer has no average.
    """
    optimizer = innermost(optimizer)
    if not hasattr(optimizer, "eval") or any("train_mode" not in group for group in optimizer.param_groups):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, which has no average to evaluate with: leave averaged() out, "
            "or train with a class of ppsf_dist, ScheduleFreeWrapper(optimizer) for instance"
        )
    swapped = [group for group in optimizer.param_groups if group["train_mode"]]
    kept = []
    if isinstance(optimizer, DistributedOptimizer):
        optimizer._engine.learn_names(model)
        optimizer.eval(keep=True)
    elif swapped:
        kept = [(p, p.detach().clone()) for group in swapped for p in group["params"]]
        optimizer.eval()
    drop_gathered_weights(model)
    try:
        yield
    finally:
        if swapped:
            optimizer.train()
            with torch.no_grad():
                for param, before in kept:
                    param.copy_(before)
            drop_gathered_weights(model)


def innermost(optimizer: Any) -> Any:
    """The optimizer inside of the wrappers that trainers and DeepSpeed put around it."""
    while not isinstance(optimizer, DistributedOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
