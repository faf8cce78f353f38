"""The method of SGDScheduleFree: momentum and schedule replaced by an average of the iterates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppsf_dist.methods.rules import DECAY
from ppsf_dist.methods.schedulefree import ScheduleFree
from ppsf_dist.methods.switches import Switches


class SGD(ScheduleFree):
    """What SGDScheduleFree is: z, and numbers that no rank needs another for."""

    name = "SGDScheduleFree"
    arguments = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0}
    rules = ScheduleFree.rules | {"momentum": DECAY}
    interpolation = "momentum"

    def switches(self, group: Mapping[str, Any]) -> Switches:
        return Switches(schedulefree=True, weight_decay=group["weight_decay"] != 0)

    def beta1(self, group: Mapping[str, Any]) -> float:
        return float(group["momentum"])


SGD_METHOD = SGD()
