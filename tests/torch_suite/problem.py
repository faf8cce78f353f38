"""The least problem to train on, and the arguments that the suite goes over."""

from __future__ import annotations

import copy
import io
import sys
import unittest
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import ppsf_dist
from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.optimizers.closures import ClosureForm
from tests.family import FAMILY

# torch's module derives a test case from one of this package, which nothing here uses.
if find_spec("expecttest") is None:
    sys.modules["expecttest"] = cast(ModuleType, SimpleNamespace(TestCase=unittest.TestCase))

from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

CPU = torch.device("cpu")


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Each argument away from its default once, as torch's own functions of this kind do."""
    arguments: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 0.5},
        "tensor lr": {"lr": torch.tensor(0.5)},
        "weight_decay": {"weight_decay": 0.1},
        "momentum": {"use_schedulefree": False},
        "speed": {"use_speed": True},
        "adopt": {"use_adopt": True},
        "focus": {"use_focus": True, "factored": False},
        "cautious": {"use_cautious": True},
        "orthograd": {"use_orthograd": True},
        "atan2": {"eps": None, "use_stableadamw": False},
        "unfactored, no quirks": {"factored": False, "reference_quirks": False},
    }
    return [OptimizerInput([], {"d0": 1e-3, **given}, name) for name, given in arguments.items()]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """What torch asks of all optimizers, and arguments out of range."""

    def refused(says: str, **given: Any) -> ErrorOptimizerInput:
        return ErrorOptimizerInput(OptimizerInput([], given), error_type=ValueError, error_regex=says)

    return [
        *get_error_inputs_for_all_optims(device, dtype),
        refused("lr=-1", lr=-1),
        refused(r"betas\[0\]=1.0", betas=(1.0, 0.0)),
        refused("weight_decay=-1", weight_decay=-1),
        refused("eps=-1", eps=-1),
    ]


INFO = OptimizerInfo(
    # Annotated as an optimizer; a class is meant.
    cast(Any, ProdigyPlusScheduleFree),
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(lambda opt: StepLR(opt, gamma=0.99999, step_size=300), lambda opt: ReduceLROnPlateau(opt)),
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
)
Optimizer = ProdigyPlusScheduleFree


class Given(NamedTuple):
    """A class and arguments for it."""

    optimizer_class: type[DistributedOptimizer]
    kwargs: dict[str, Any]
    name: str


SISTERS = [
    Given(cls, member.variants["default"], name)
    for name, member in FAMILY.items()
    for cls in [getattr(ppsf_dist, name)]
    # The suite steps without a closure.
    if not issubclass(cls, ClosureForm)
]
INPUTS = [*[Given(Optimizer, given.kwargs, given.desc) for given in INFO.optim_inputs_func(CPU)], *SISTERS]
every_input = pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.name)


def build(params: Any) -> Optimizer:
    return Optimizer(params, d0=1e-3)


def build_given(params: Any, given: Given) -> DistributedOptimizer:
    arguments: Any = copy.deepcopy(given.kwargs)
    return given.optimizer_class(params, **arguments)


def problem() -> tuple[nn.Parameter, nn.Parameter, Callable[[], Tensor]]:
    torch.manual_seed(0)
    weight, bias, x = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10)), torch.randn(5)
    return weight, bias, lambda: (weight.mv(x) + bias).square().sum()


def steps(optimizer: DistributedOptimizer, loss: Callable[[], Tensor], count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def trained(count: int = 3) -> tuple[Optimizer, Callable[[], Tensor]]:
    weight, bias, loss = problem()
    optimizer = build([weight, bias])
    steps(optimizer, loss, count)
    return optimizer, loss


def trained_given(given: Given) -> DistributedOptimizer:
    weight, bias, loss = problem()
    optimizer = build_given([weight, bias], given)
    steps(optimizer, loss)
    return optimizer


def params_of(optimizer: DistributedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
