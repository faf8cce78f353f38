"""prodigy-plus-schedule-free 2.0.1, the oracle, and how close to it a step must be."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference
from torch import Tensor

from tests.harness.models import D0
from tests.runs import make_groups

__all__ = ["Reference", "close", "make_reference"]

RELATIVE = 2e-6
"""Bound of one step, in fp32 with sums in another order, beside one rounding unit of the largest element."""


def make_reference(parameters: dict[str, Any], groups: int = 1, **switches: Any) -> Reference:
    """The reference on the same groups as ``tests.runs.make_optimizer``; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return Reference(make_groups(parameters, groups), **{"d0": D0, **switches})


def quiet_step(optimizer: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer.step()


def close(actual: Tensor, expected: Tensor, relative: float = RELATIVE) -> bool:
    """Whether tensors agree to ``relative`` plus one rounding unit of their dtype at the size of each element."""
    a, b = actual.double(), expected.double()
    unit = torch.finfo(expected.dtype).eps * b.abs()
    return bool(((a - b).abs() <= relative * b.abs().max() + unit).all())
