"""What is measured: ours, the reference implementations, and torch's own."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ppsf_dist
from benchmarks.operators import Operators
from benchmarks.traffic import Loops, Traffic
from tests.harness.kernels import kernels

Build = Callable[[list[nn.Parameter]], Any]

BASELINE = "AdamW fused"
OURS = "ppsf_dist"


def _ours(choice: str = "auto", name: str = "ProdigyPlusScheduleFree", **arguments: Any) -> Build:
    def build(params: list[nn.Parameter]) -> Any:
        # On a GPU the fast ones have to be asked for.
        asked = "native" if choice == "auto" and params[0].is_cuda else choice
        with kernels(asked):
            return getattr(ppsf_dist, name)(params, **arguments)

    return build


class _Captured:
    """Steps by ``ppsf_dist.CapturedStep``."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        if not params[0].is_cuda:
            raise ValueError("a step is captured on a GPU alone")
        optimizer = _ours()(params)
        self.state, self.step = optimizer.state, ppsf_dist.CapturedStep(optimizer, warm_up=1)


def _reference(params: list[nn.Parameter]) -> Any:
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree

    return ProdigyPlusScheduleFree(params)


def _prodigy(slice_p: int) -> Build:
    def build(params: list[nn.Parameter]) -> Any:
        from prodigyopt import Prodigy

        return Prodigy(params, slice_p=slice_p)

    return build


def _schedulefree(params: list[nn.Parameter]) -> Any:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params)
    optimizer.train()
    return optimizer


def _deepspeed(params: list[nn.Parameter]) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params)


OPTIMIZERS: dict[str, Build] = {
    BASELINE: lambda params: torch.optim.AdamW(params, fused=True),
    OURS: _ours(),
    "ppsf_dist captured": _Captured,
    "ppsf_dist eager": _ours("eager"),
    "ppsf_dist speed": _ours(use_speed=True),
    "ppsf_dist unfactored": _ours(factored=False),
    "ppsf_dist decay": _ours(weight_decay=0.1),
    "ppsf_dist momentum": _ours(use_schedulefree=False),
    "ppsf_dist Prodigy": _ours(name="Prodigy", slice_p=11),
    "ppsf_dist AdamWScheduleFree": _ours(name="AdamWScheduleFree"),
    "ppsf_dist SGDScheduleFree": _ours(name="SGDScheduleFree"),
    "memory alone": Traffic,
    "loops alone": Loops,
    "operators alone": Operators,
    "prodigy-plus-schedule-free": _reference,
    "prodigyopt slice_p=1": _prodigy(1),
    "prodigyopt slice_p=11": _prodigy(11),
    "schedulefree AdamW": _schedulefree,
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW for-loop": lambda params: torch.optim.AdamW(params, foreach=False),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "DeepSpeedCPUAdam": _deepspeed,
}
"""By the names that tables and ``--optimizers`` use."""


def build(name: str, params: list[nn.Parameter]) -> Any:
    """An optimizer of that name. What it prints and warns of is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return OPTIMIZERS[name](params)
