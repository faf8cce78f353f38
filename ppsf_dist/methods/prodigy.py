"""The method of Prodigy: Adam's step times a step size d that it finds itself, one for all groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm import second_moment, step_size
from ppsf_dist.algorithm.step_size import GlobalStepSize
from ppsf_dist.methods.base import AVERAGING, Group, Method, StepNumbers, Total
from ppsf_dist.methods.rules import (
    ANY,
    DECAY,
    GROWTH,
    NOT_NEGATIVE,
    POSITIVE,
    SWITCH,
    Rule,
    check_betas,
    check_step_size,
    finite_growth,
    integer,
    or_none,
)  # fmt: skip
from ppsf_dist.methods.switches import Switches

ARGUMENTS: dict[str, Any] = {
    "lr": 1.0,
    "betas": (0.9, 0.999),
    "beta3": None,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decouple": True,
    "use_bias_correction": False,
    "safeguard_warmup": False,
    "d0": 1e-6,
    "d_coef": 1.0,
    "growth_rate": math.inf,
    "slice_p": 1,
}
"""Defaults of a group, in the order of the reference's signature."""

_SWITCHES = ("decouple", "use_bias_correction", "safeguard_warmup", "reference_quirks")


class ProdigyNumbers(StepNumbers):
    """The numbers of one step: its length d * lr, and d after its sums."""

    def _begin(self) -> None:
        super()._begin()
        h, numbers, self._d = self.hyper, self._numbers, self._numbers["d"].clone()
        self.pauses = h["lr"] == 0
        correction = second_moment.bias_correction(self.k[:1] + 1, h["beta1"][:1], h["beta2"][:1])
        self.delta = self._d * h["lr"].amax() * torch.where(h["use_bias_correction"] > 0, correction, 1.0)
        self.c, self.q = torch.zeros_like(self._d), torch.ones_like(self._d)
        self._before = GlobalStepSize(*(numbers[name].clone() for name in GlobalStepSize._fields))
        self._now = self._before

    def _is_sound(self) -> Tensor:
        lr = self.hyper["lr"]
        return super()._is_sound() & ((lr == 0) | (lr == lr.amax()))

    def coefficients(self) -> dict[str, Tensor]:
        h, d, now = self.hyper, self._d, self._now.d
        beta1, beta2, one = h["beta1"], h["beta2"], torch.ones_like(self._d)
        return super().coefficients() | {
            "gain": torch.where(beta1 > 0, one, now),
            "d_eps": now * h["eps"],
            "momentum_weight": (1 - beta1) * d,
            "beta2": beta2,
            "square_weight": (1 - beta2) * d * d,
            "beta3": h["beta3"],
            "s_weight": d / h["d0"] * torch.where(h["safeguard_warmup"] > 0, d, self.delta),
        }

    def learn(self, totals: Tensor) -> None:
        h = self.hyper
        weight = self._d / h["d0"] * self.delta
        numerator, denominator = (weight * totals[Total.NUMERATOR]).sum(), totals[Total.DENOMINATOR].sum()
        self._now = step_size.adapted_for_all(
            self._before, numerator, denominator, h["beta3"][0], h["d0"], h["d_coef"], h["growth_rate"]
        )
        # Where no gradient has been seen yet there is no estimate, and no step.
        self.moves = (denominator > 0).expand_as(self.k)
        self._table = None

    def _adapt(self, numbers: dict[str, Tensor], totals: Tensor) -> None:
        numbers |= self._now._asdict()


class ProdigyMethod(Method):
    """What Prodigy is."""

    name = "Prodigy"
    arguments = {**ARGUMENTS, "reference_quirks": True}
    wide = (
        "d0", "beta3", "d_coef", "growth_rate", "use_bias_correction", "safeguard_warmup", "reference_quirks",
    )  # fmt: skip
    rules = {
        "beta3": or_none(DECAY, "None or 0 <= beta3 < 1"),
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "d0": POSITIVE,
        "d_coef": POSITIVE,
        "growth_rate": GROWTH,
        "slice_p": integer(1),
        **{name: SWITCH for name in _SWITCHES},
    }
    numbers = {
        "d": 0.0, "d_max": 0.0, "d_hat": 0.0, "d_numerator": 0.0, "d_denom": 0.0, "k": 0.0, "skipped_steps": 0.0,
    }  # fmt: skip
    number_rules = {
        "d": POSITIVE, "d_max": POSITIVE, "d_hat": ANY, "d_numerator": ANY, "d_denom": NOT_NEGATIVE, "k": integer(0),
    }  # fmt: skip
    hyper = (
        "lr", "beta1", "beta2", "beta3", "eps", "weight_decay", "use_bias_correction", "safeguard_warmup", "d0",
        "d_coef", "growth_rate",
    )  # fmt: skip
    coefficients = (*AVERAGING, "d_eps", "momentum_weight", "beta2", "square_weight", "beta3", "s_weight")
    d_timing = "current"
    structural = ("slice_p",)
    younger = ("reference_quirks",)
    foreign = ("fsdp_in_use",)
    interpolation = "betas[0]"
    step_numbers = ProdigyNumbers
    first_lr = Rule("a finite number > 0 (1.0 unless you scale d)", POSITIVE.fits)

    def switches(self, group: Mapping[str, Any]) -> Switches:
        decays = group["weight_decay"] != 0
        return Switches(
            schedulefree=False,
            momentum=group["betas"][0] > 0,
            second_moment=True,
            statistics=True,
            slice_p=group["slice_p"],
            samples="like weights" if group["reference_quirks"] else "fp32",
            weight_decay=decays and group["decouple"],
            coupled_decay=decays and not group["decouple"],
        )

    def hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        beta3 = beta2**0.5 if group["beta3"] is None else group["beta3"]
        growth_rate = finite_growth(group["growth_rate"])
        numbers = {**group, "beta1": beta1, "beta2": beta2, "beta3": beta3, "growth_rate": growth_rate}
        return tuple([float(numbers[name]) for name in self.hyper])

    def beta1(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][0])

    def initial_numbers(self, group: Mapping[str, Any]) -> Group:
        d0 = float(group["d0"])
        return super().initial_numbers(group) | {"d": d0, "d_max": d0, "d_hat": d0}

    def validate_group(self, group: MutableMapping[str, Any], *, lr_may_be_zero: bool = True) -> None:
        check_betas(group)
        super().validate_group(group, lr_may_be_zero=lr_may_be_zero)
        check_step_size("d0", group)

    def validate_numbers(self, group: MutableMapping[str, Any]) -> None:
        super().validate_numbers(group)
        check_step_size("d", group)

    def validate_together(self, groups: Sequence[Group]) -> None:
        super().validate_together(groups)
        self.validate_step(groups)

    def validate_step(self, groups: Sequence[Group]) -> None:
        # A tensor is looked at on the device: there another lr makes the step change nothing, as if it were not finite.
        rates = {index: group["lr"] for index, group in enumerate(groups) if not isinstance(group["lr"], Tensor)}
        moving = {index: lr for index, lr in rates.items() if lr != 0}
        if len(set(moving.values())) > 1:
            raise ValueError(
                f"lr is {', '.join(f'{lr} in group {index}' for index, lr in moving.items())}: one step size d serves "
                "all groups, so each may have the same lr or 0, to stand still"
            )

    def settle(self, group: MutableMapping[str, Any]) -> list[str]:
        doubt = self.doubt_about_lr(float(group["lr"]))
        said = [] if doubt is None else [doubt]
        if group["betas"][0] == 0:
            said.append(
                "betas[0]=0: steps are divided by the second moment of d * g alone, so they are as large as lr * d / "
                "sqrt(1 - betas[1]) at first; use 0.9 unless you mean it"
            )
        return said


PRODIGY = ProdigyMethod()
