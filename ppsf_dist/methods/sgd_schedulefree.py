"""The method of SGDScheduleFree: momentum and schedule replaced by an average of the iterates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ppsf_dist.algorithm import averaging
from ppsf_dist.methods.base import Group, GroupTable, Method, StepNumbers
from ppsf_dist.methods.rules import ANY, DECAY, NOT_NEGATIVE, integer
from ppsf_dist.methods.switches import Switches


class SGDNumbers(StepNumbers):
    """The numbers of one step: a warmed-up learning rate, and the weight of the step in the average."""

    def __init__(self, numbers: GroupTable, groups: Sequence[Group], seed: int) -> None:
        super().__init__(numbers, groups, seed)
        h = self.hyper
        self.delta = h["lr"] * averaging.warm_up(self.k, h["warmup_steps"])
        self._lr_max = self.delta.maximum(numbers["lr_max"])
        weight = (self.k + 1) ** h["r"] * self._lr_max ** h["weight_lr_power"]
        self.c, self._weight_sum = averaging.share(weight, numbers["weight_sum"])
        self.q = 1 - h["beta1"] * (1 - self.c)

    def _adapt(self, put: Callable[[str, Tensor, Tensor], Tensor], totals: Tensor) -> None:
        everywhere = self.k >= 0
        put("scheduled_lr", self.delta, everywhere)
        put("lr_max", self._lr_max, everywhere)
        put("weight_sum", self._weight_sum, everywhere)


class SGD(Method):
    """What SGDScheduleFree is: z, and numbers that no rank needs another for."""

    name = "SGDScheduleFree"
    arguments = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0}
    rules = {
        "momentum": DECAY,
        "weight_decay": NOT_NEGATIVE,
        "warmup_steps": integer(0),
        "r": ANY,
        "weight_lr_power": ANY,
    }
    numbers = {"k": 0.0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0, "skipped_steps": 0.0}
    number_rules = {"k": integer(0), "weight_sum": NOT_NEGATIVE, "lr_max": ANY, "scheduled_lr": NOT_NEGATIVE}
    hyper = ("lr", "beta1", "weight_decay", "warmup_steps", "r", "weight_lr_power")
    foreign = ("foreach",)
    interpolation = "momentum"
    step_numbers = SGDNumbers

    def switches(self, group: Mapping[str, Any]) -> Switches:
        return Switches(schedulefree=True, weight_decay=group["weight_decay"] != 0)

    def hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        numbers = {**group, "beta1": group["momentum"]}
        return tuple([float(numbers[name]) for name in self.hyper])

    def beta1(self, group: Mapping[str, Any]) -> float:
        return float(group["momentum"])


SGD_METHOD = SGD()
