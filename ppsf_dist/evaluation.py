"""Evaluating with the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from ppsf_dist.fsdp.modules import reshard


@contextmanager
def averaged(optimizer: Optimizer, model: nn.Module | None = None) -> Iterator[None]:
    """Evaluate with the averaged weights x, then go back to the training weights y, bit for bit.

    Args:
        optimizer: a :class:`ppsf_dist.ProdigyPlusScheduleFree`, or any optimizer with ``train()`` and ``eval()`` that
            swap its parameters in place.
        model: the model that it trains. FSDP2 keeps gathered copies of some weights between forward passes, which a
            swap does not reach: give the model so that they are dropped.

    Already inside an evaluation (``optimizer.eval()`` was called), nothing is swapped.
    """
    swapped = [group for group in optimizer.param_groups if group["train_mode"]]
    kept = [p.detach().clone() for group in swapped for p in group["params"]] if swapped else []
    if swapped:
        optimizer.eval()  # type: ignore[attr-defined]
        reshard(model)
    try:
        yield
    finally:
        if swapped:
            optimizer.train()  # type: ignore[attr-defined]
            with torch.no_grad():
                for param, before in zip((p for group in swapped for p in group["params"]), kept, strict=True):
                    param.copy_(before)
            reshard(model)
