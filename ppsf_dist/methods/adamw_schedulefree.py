"""The methods of AdamWScheduleFree and RAdamScheduleFree: Schedule-Free averaging of Adam's steps without momentum."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm import second_moment
from ppsf_dist.methods.base import AVERAGING
from ppsf_dist.methods.rules import POSITIVE, SWITCH, check_betas
from ppsf_dist.methods.schedulefree import ScheduleFree, ScheduleFreeNumbers
from ppsf_dist.methods.switches import Switches

_OF_ADAM = {"lr": 0.0025, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class AdamWNumbers(ScheduleFreeNumbers):
    """Those of Schedule-Free, and the bias correction of the second moment."""

    def coefficients(self) -> dict[str, Tensor]:
        h = self.hyper
        # g / (sqrt(V / correction) + eps) in terms of the root that is there.
        root = (1 - h["beta2"] ** (self.k + 1)).sqrt()
        return super().coefficients() | {
            "gain": root,
            "d_eps": h["eps"] * root,
            "beta2": h["beta2"],
            "square_weight": 1 - h["beta2"],
        }


class AdamW(ScheduleFree):
    """What AdamWScheduleFree is: z and Adam's second moment."""

    name = "AdamWScheduleFree"
    arguments = _OF_ADAM | {"warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0}
    rules = ScheduleFree.rules | {"eps": POSITIVE}
    hyper: tuple[str, ...] = (*ScheduleFree.hyper, "beta2", "eps")
    coefficients: tuple[str, ...] = (*AVERAGING, "d_eps", "beta2", "square_weight")
    interpolation = "betas[0]"
    step_numbers = AdamWNumbers

    def switches(self, group: Mapping[str, Any]) -> Switches:
        return Switches(schedulefree=True, second_moment=True, weight_decay=group["weight_decay"] != 0)

    def hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return super().hyper_row({**group, "beta2": group["betas"][1]})

    def beta1(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][0])

    def validate_group(self, group: MutableMapping[str, Any], *, lr_may_be_zero: bool = True) -> None:
        check_betas(group)
        super().validate_group(group, lr_may_be_zero=lr_may_be_zero)


class RAdamNumbers(AdamWNumbers):
    """With RAdam's rectification in place of a warm-up.

    While the variance of the second moment is intractable, steps are those of SGD, or have length 0.
    """

    def schedule(self) -> Tensor:
        h = self.hyper
        self._rectification = second_moment.radam(self.k + 1, h["beta2"])[1]
        self._as_sgd = (self._rectification == 0) & (h["silent_sgd_phase"] == 0)
        return torch.where(self._as_sgd, 1.0, self._rectification)

    def coefficients(self) -> dict[str, Tensor]:
        as_sgd, of_adam = self._as_sgd, super().coefficients()
        one = torch.ones_like(of_adam["gain"])
        return of_adam | {
            "gain": torch.where(as_sgd, one, of_adam["gain"]),
            "d_eps": torch.where(as_sgd, one, of_adam["d_eps"]),
            "root": torch.where(as_sgd, 0.0, one),
        }


class RAdam(AdamW):
    """What RAdamScheduleFree is."""

    name = "RAdamScheduleFree"
    arguments = _OF_ADAM | {"r": 0.0, "weight_lr_power": 2.0, "silent_sgd_phase": True}
    rules = {name: rule for name, rule in AdamW.rules.items() if name != "warmup_steps"} | {"silent_sgd_phase": SWITCH}
    hyper = (*AdamW.hyper, "silent_sgd_phase")
    coefficients = (*AdamW.coefficients, "root")
    step_numbers = RAdamNumbers

    def switches(self, group: Mapping[str, Any]) -> Switches:
        return Switches(
            schedulefree=True,
            second_moment=True,
            sgd_phase=not group["silent_sgd_phase"],
            weight_decay=group["weight_decay"] != 0,
        )

    def hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return super().hyper_row({**group, "warmup_steps": 0})


ADAMW_METHOD, RADAM_METHOD = AdamW(), RAdam()
