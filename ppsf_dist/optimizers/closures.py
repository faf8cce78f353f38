"""Closure forms of the Schedule-Free optimizers: no train() and eval(), the weights are the average between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
import torch.distributed as dist

from ppsf_dist.compiling import uncompiled
from ppsf_dist.engine.from_average import step_from_average
from ppsf_dist.methods.closures import ADAMW_CLOSURE, RADAM_CLOSURE, SGD_CLOSURE
from ppsf_dist.optimizers.base import DistributedOptimizer, Params


class ClosureForm(DistributedOptimizer):
    """What the closure forms have in common.

    Numerics are those of the closure forms of schedulefree 1.4.1, but that the average is kept aside while the closure
    looks at y, in memory as large as the weights: a parameter without a gradient keeps its average, which the reference
    loses, and no digit is lost where nothing has moved.
    """

    starts_in_train_mode = False

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: the closure sees the training weights y; before and afterwards the weights are their average x.

        Args:
            closure: computes the loss and its gradients, and returns the loss.

        Raises:
            ValueError: there is no closure.
            RuntimeError, ValueError: as of ``ppsf_dist.SGDScheduleFree.step``. The weights are the average again.
        """
        if closure is None and not self.state and all(float(group["lr"]) == 0 for group in self.param_groups):
            # With which distributed checkpoints create state.
            super().step()
            return None
        if closure is None:
            raise ValueError(
                f"{self.method.name}.step() needs a closure that computes the loss and its gradients, step(closure); "
                f"where nobody can give it one, use {self.method.name.removesuffix('Closure')} with train() and eval()"
            )
        return step_from_average(self._engine, torch.enable_grad()(closure))

    @uncompiled
    def eval(self, *, keep: bool = False) -> None:
        """Nothing: between steps the weights are the average."""

    @uncompiled
    def train(self, mode: bool = True) -> None:
        """Nothing: ``step`` itself goes to the training weights and back."""


class SGDScheduleFreeClosure(ClosureForm):
    """``ppsf_dist.SGDScheduleFree`` for programs whose ``step()`` takes a closure.

    Arguments are as there; their order is that of the closure form of schedulefree 1.4.1.

    Raises:
        ValueError: an argument is out of range or misspelt.
    """

    method = SGD_CLOSURE

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.method.arguments}, process_group=process_group)


class AdamWScheduleFreeClosure(ClosureForm):
    """``ppsf_dist.AdamWScheduleFree`` for programs whose ``step()`` takes a closure.

    Arguments are as there.

    Raises:
        ValueError: an argument is out of range or misspelt.
    """

    method = ADAMW_CLOSURE

    def __init__(
        self,
        params: Params,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.method.arguments}, process_group=process_group)


class RAdamScheduleFreeClosure(ClosureForm):
    """``ppsf_dist.RAdamScheduleFree`` for programs whose ``step()`` takes a closure.

    Arguments are as there.

    Raises:
        ValueError: an argument is out of range or misspelt.
    """

    method = RADAM_CLOSURE

    def __init__(
        self,
        params: Params,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        silent_sgd_phase: bool = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.method.arguments}, process_group=process_group)
