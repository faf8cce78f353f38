"""The rivals: which optimizer, with which arguments, over which grid, under which schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import ppsf_dist
from benchmarks.quality.published import NAdamW, ScheduleFreePlus

WARM_UP = 0.05
"""Part of the steps in which the learning rate of AdamW, Schedule-Free AdamW and ScheduleFree+ rises."""
BETAS = (0.9, 0.99)
# What won on AlgoPerf's workloads together, and what its self-tuning baseline takes; the decay included.
NADAMW = {"betas": (0.93266073836, 0.9955159689799007), "weight_decay": 0.08121616522670176}
NADAMW_LR, NADAMW_WARM_UP = 0.0017486387539278373, 0.02

CONSTANT, COSINE = "constant", "cosine"


class Trainer(Protocol):
    """An optimizer as a training here wants it."""

    def step(self, loss: Tensor, factor: float) -> None:
        """One step, its learning rate times a factor."""

    def averaged(self) -> AbstractContextManager[object]:
        """Hold the weights to evaluate with in the model, inside ``with``."""

    def sizes(self) -> dict[str, float]:
        """The step size, by its name."""


@dataclass(frozen=True)
class Rival:
    """A row of the tables.

    Attributes:
        title: as it is shown.
        make: makes it for a model and a learning rate (or the multiplier of what it finds itself).
        schedule: of the factor of the learning rate.
        warm_up: part of the steps in which the factor rises.
        grid: whether the learning rate has to be found; else it is 1, and what is found is multiplied by it.
        multipliers: of a rival without a grid.
    """

    title: str
    make: Callable[[nn.Module, float], Trainer]
    schedule: str = CONSTANT
    warm_up: float = 0.0
    grid: bool = False
    multipliers: tuple[float, ...] = (1.0,)

    def factor(self, step: int, steps: int) -> float:
        """What multiplies the learning rate in a step, counted from 1."""
        rising = round(self.warm_up * steps)
        if step <= rising:
            return step / (rising + 1)
        if self.schedule == CONSTANT:
            return 1.0
        return (1 + math.cos(math.pi * (step - 1 - rising) / (steps - rising))) / 2


@dataclass
class _Torch:
    """An optimizer with ``param_groups``: one of torch's, or of this package."""

    model: nn.Module
    optimizer: Any
    averages: bool
    clip: float = 0.0
    lr: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.lr = [group["lr"] for group in self.optimizer.param_groups]
        if self.averages:
            self.optimizer.train()

    def step(self, loss: Tensor, factor: float) -> None:
        if factor != 1.0 or self.optimizer.param_groups[0]["lr"] != self.lr[0]:
            for group, lr in zip(self.optimizer.param_groups, self.lr, strict=True):
                group["lr"] = lr * factor
        if self.clip:
            nn.utils.clip_grad_norm_(_trained(self.model), self.clip)
        self.optimizer.step()

    def averaged(self) -> AbstractContextManager[object]:
        return ppsf_dist.averaged(self.optimizer, self.model) if self.averages else contextlib.nullcontext()

    def sizes(self) -> dict[str, float]:
        group = self.optimizer.param_groups[0]
        return {"d": group["d"]} if "d" in group else {"lr": group["lr"]}


@dataclass
class _NAdamW:
    optimizer: NAdamW
    lr: float

    def step(self, loss: Tensor, factor: float) -> None:
        self.optimizer.lr = self.lr * factor
        self.optimizer.step()

    def averaged(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def sizes(self) -> dict[str, float]:
        return {"lr": self.optimizer.lr}


@dataclass
class _Plus:
    optimizer: ScheduleFreePlus

    def step(self, loss: Tensor, factor: float) -> None:
        self.optimizer.step(float(loss), factor)

    def averaged(self) -> AbstractContextManager[object]:
        return self.optimizer.averaged()

    def sizes(self) -> dict[str, float]:
        return {"d": self.optimizer.size}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _ours(clip: float = 0.0, **arguments: Any) -> Callable[[nn.Module, float], Trainer]:
    """Ours; what multiplies the step size that it finds is its learning rate, which d does not see."""

    def make(model: nn.Module, lr: float) -> Trainer:
        optimizer = ppsf_dist.ProdigyPlusScheduleFree(_trained(model), lr=lr, **arguments)
        return _Torch(model, optimizer, averages=arguments.get("use_schedulefree", True), clip=clip)

    return make


def _adamw(model: nn.Module, lr: float) -> Trainer:
    return _Torch(model, torch.optim.AdamW(_trained(model), lr=lr, betas=BETAS, weight_decay=0.0), averages=False)


def _fixed(lr: float) -> Callable[[nn.Module, float], Trainer]:
    return lambda model, multiplier: _adamw(model, lr * multiplier)


def _schedulefree(model: nn.Module, lr: float) -> Trainer:
    return _Torch(model, ppsf_dist.AdamWScheduleFree(_trained(model), lr=lr, betas=BETAS), averages=True)


def _prodigy(model: nn.Module, lr: float) -> Trainer:
    return _Torch(model, ppsf_dist.Prodigy(_trained(model), lr=lr), averages=False)


def _nadamw(model: nn.Module, lr: float) -> Trainer:
    return _NAdamW(NAdamW(_trained(model), lr=NADAMW_LR * lr, **NADAMW), NADAMW_LR * lr)  # type: ignore[arg-type]


def _plus(model: nn.Module, lr: float) -> Trainer:
    return _Plus(ScheduleFreePlus(_trained(model), lr=lr))


ADAMW, SCHEDULEFREE, DEFAULT, RECOMMENDED = "adamw", "schedulefree", "ours", "recommended"

OURS: Mapping[str, dict[str, Any]] = {
    DEFAULT: {},
    RECOMMENDED: dict(ppsf_dist.RECOMMENDED),
    "ours-bias": {"use_bias_correction": True},
    "ours-c50": {"schedulefree_c": 50},
    "ours-no-quirks": {"reference_quirks": False},
    "ours-bias-no-quirks": {"use_bias_correction": True, "reference_quirks": False},
    "ours-beta95": {"betas": (0.95, 0.99)},
    "ours-d_coef2": {"d_coef": 2.0},
    "ours-speed": {"use_speed": True},
}
"""The arguments of each of ours that needs nothing else."""
_NAMED = (DEFAULT, RECOMMENDED)

MULTIPLIERS = (0.5, 1.0, 2.0)
"""Of the step size that the recommended setting finds: whether another one would have been better."""


def _title(arguments: Mapping[str, Any]) -> str:
    return "ours, " + ", ".join(f"`{name}={value}`" for name, value in arguments.items())


RIVALS: Mapping[str, Rival] = {
    ADAMW: Rival("AdamW, cosine, warm-up", _adamw, COSINE, WARM_UP, grid=True),
    SCHEDULEFREE: Rival("Schedule-Free AdamW, warm-up", _schedulefree, CONSTANT, WARM_UP, grid=True),
    "adamw-1e-3": Rival("AdamW, lr 0.001 everywhere", _fixed(1e-3), COSINE, WARM_UP),
    "adamw-8e-3": Rival("AdamW, lr 0.008 everywhere", _fixed(8e-3), COSINE, WARM_UP),
    "nadamw": Rival("NAdamW, fixed, cosine, warm-up", _nadamw, COSINE, NADAMW_WARM_UP),
    "prodigy": Rival("Prodigy, cosine", _prodigy, COSINE),
    "plus": Rival("ScheduleFree+, warm-up", _plus, CONSTANT, WARM_UP),
    DEFAULT: Rival("ours, default", _ours()),
    RECOMMENDED: Rival("ours, recommended", _ours(**ppsf_dist.RECOMMENDED), multipliers=MULTIPLIERS),
    **{name: Rival(_title(arguments), _ours(**arguments)) for name, arguments in OURS.items() if name not in _NAMED},
    "ours-no-average": Rival(
        "ours, `use_schedulefree=False`, cosine", _ours(use_schedulefree=False), COSINE
    ),
    "recommended-clip": Rival("recommended, gradients clipped to 1", _ours(clip=1.0, **ppsf_dist.RECOMMENDED)),
    "recommended-warm-up": Rival("recommended, warm-up", _ours(**ppsf_dist.RECOMMENDED), CONSTANT, WARM_UP),
    "recommended-cosine": Rival("recommended, cosine", _ours(**ppsf_dist.RECOMMENDED), COSINE),
}  # fmt: skip
MAIN = (ADAMW, SCHEDULEFREE, "adamw-1e-3", "adamw-8e-3", "nadamw", "prodigy", "plus", DEFAULT, RECOMMENDED)
"""What is compared on every workload; all others are variants of ours."""
VARIANTS = (DEFAULT, RECOMMENDED, *(name for name in RIVALS if name not in MAIN))
