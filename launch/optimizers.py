"""--optimizer: which one trains, with which learning rate and schedule, and what the log shows of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

import ppsf_dist
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.optimizers.closures import ClosureForm

if TYPE_CHECKING:
    from options import Settings

FAMILY = (
    "ProdigyPlusScheduleFree", "Prodigy", "AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree",
    "AdamWScheduleFreeClosure", "SGDScheduleFreeClosure", "RAdamScheduleFreeClosure",
)  # fmt: skip
WRAPPER, ADAMW = "ScheduleFreeWrapper", "AdamW"
NAMES = (*FAMILY, WRAPPER, ADAMW)
"""Those of the package, the wrapper around torch's AdamW without momentum, and torch's AdamW to compare with."""

CONSTANT, COSINE = "constant", "cosine"
SCHEDULES = (CONSTANT, COSINE)
FALLING = ("Prodigy", ADAMW)
"""What averages nothing is given a schedule that falls to 0, unless told otherwise."""

WRAPPED_BETAS = (0.0, 0.999)
# Arguments that no command line can give.
NOT_A_SWITCH = ("params", "process_group", "base", "lr")


def constructor(name: str) -> Callable[..., Optimizer]:
    """The class of a name of --optimizer."""
    return torch.optim.AdamW if name == ADAMW else getattr(ppsf_dist, name)


def arguments_of(name: str) -> list[str]:
    """What --opt may set. The learning rate has an option of its own."""
    return [argument for argument in inspect.signature(constructor(name)).parameters if argument not in NOT_A_SWITCH]


def schedule_of(settings: Settings) -> str:
    """The schedule of a run: as it was asked for, or what its optimizer needs."""
    return settings.schedule or (COSINE if settings.optimizer in FALLING else CONSTANT)


def make(settings: Settings, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer that the settings ask for.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """
    name, arguments = settings.optimizer, dict(settings.opt)
    lr = {} if settings.lr is None else {"lr": settings.lr}
    if name == WRAPPER:
        return ppsf_dist.ScheduleFreeWrapper(torch.optim.AdamW(parameters, betas=WRAPPED_BETAS, **lr), **arguments)  # type: ignore[arg-type]
    if "seed" in arguments_of(name):
        arguments = {"seed": settings.seed, **arguments}
    return constructor(name)(parameters, **lr, **arguments)


def factor(settings: Settings, step: int) -> float:
    """What multiplies the learning rate in a step: a warm-up, then a cosine to 0 over the rest of --steps, or nothing.

    Args:
        settings: of the run.
        step: counted from 1.
    """
    if step <= settings.warmup:
        return step / (settings.warmup + 1)
    if schedule_of(settings) == CONSTANT:
        return 1.0
    done = (step - 1 - settings.warmup) / (settings.steps - settings.warmup)
    return (1 + math.cos(math.pi * done)) / 2


class Handle:
    """An optimizer of any of the ``NAMES`` as the training loop wants it.

    Attributes:
        averages: whether evaluation takes an average of the weights.
        needs_closure: whether ``step()`` computes the gradients itself.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.averages = _averages(optimizer)
        self.needs_closure = isinstance(optimizer, ClosureForm)
        self._lr = [float(group["lr"]) for group in optimizer.param_groups]

    def train(self) -> None:
        """Put the training weights into the model, where there are others."""
        if self.averages:
            self.optimizer.train()

    def averaged(self, model: nn.Module, optimizer: Any = None) -> AbstractContextManager[object]:
        """Hold the weights to evaluate with in the model, inside ``with``."""
        return ppsf_dist.averaged(optimizer or self.optimizer, model) if self.averages else nullcontext()

    def schedule(self, settings: Settings, step: int) -> None:
        """Set the learning rate of a step."""
        for group, lr in zip(self.optimizer.param_groups, self._lr, strict=True):
            group["lr"] = lr * factor(settings, step)

    def numbers(self) -> dict[str, float]:
        """What the log shows: the learning rate, the step size d and what follows from it, where there is one."""
        (group, *_), shown = self.optimizer.param_groups, {}
        if "d" in group:
            shown["d"] = self.optimizer.get_d_estimate()
        return shown | {name: float(group[name]) for name in ("lr", "effective_lr") if name in group}

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing; torch's AdamW skips none."""
        return int(getattr(self.optimizer, "skipped_steps", 0))


def _averages(optimizer: Any) -> bool:
    if isinstance(optimizer, DistributedOptimizer):
        return all(optimizer.method.switches(group).schedulefree for group in optimizer.param_groups)
    return isinstance(optimizer, ppsf_dist.ScheduleFreeWrapper)
