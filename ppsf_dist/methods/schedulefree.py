"""What the Schedule-Free optimizers have in common: a schedule replaced by an average of the iterates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ppsf_dist.algorithm import averaging
from ppsf_dist.methods.base import Method, StepNumbers
from ppsf_dist.methods.rules import ANY, NOT_NEGATIVE, integer


class ScheduleFreeNumbers(StepNumbers):
    """The numbers of one step: a learning rate, and the weight of the step in the average."""

    def _begin(self) -> None:
        super()._begin()
        h, numbers = self.hyper, self._numbers
        self.delta = h["lr"] * self.schedule()
        self._lr_max = self.delta.maximum(numbers["lr_max"])
        weight = (self.k + 1) ** h["r"] * self._lr_max ** h["weight_lr_power"]
        self.c, self._weight_sum = averaging.share(weight, numbers["weight_sum"])
        self.q = 1 - h["beta1"] * (1 - self.c)

    def schedule(self) -> Tensor:
        """What multiplies the learning rate in this step: a warm-up."""
        return averaging.warm_up(self.k, self.hyper["warmup_steps"])

    def _adapt(self, numbers: dict[str, Tensor], totals: Tensor) -> None:
        numbers |= {"scheduled_lr": self.delta, "lr_max": self._lr_max, "weight_sum": self._weight_sum}


class ScheduleFree(Method):
    """Rules and numbers of a Schedule-Free optimizer; its own arguments come with each."""

    rules = {"weight_decay": NOT_NEGATIVE, "r": ANY, "weight_lr_power": ANY, "warmup_steps": integer(0)}
    numbers = {"k": 0.0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0, "skipped_steps": 0.0}
    number_rules = {"k": integer(0), "weight_sum": NOT_NEGATIVE, "lr_max": ANY, "scheduled_lr": NOT_NEGATIVE}
    hyper: tuple[str, ...] = ("lr", "beta1", "weight_decay", "r", "weight_lr_power", "warmup_steps")
    foreign = ("foreach",)
    step_numbers = ScheduleFreeNumbers

    def hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        numbers = {**group, "beta1": self.beta1(group)}
        return tuple([float(numbers[name]) for name in self.hyper])
