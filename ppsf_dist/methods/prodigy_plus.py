"""The method of ProdigyPlusScheduleFree: Prodigy's d, Schedule-Free's average, factored moments, SPEED.

Names, order and defaults of the arguments are those of prodigy-plus-schedule-free 2.0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm import averaging, second_moment, step_size
from ppsf_dist.algorithm.step_size import SpeedState, StepSize, StepSizeRule
from ppsf_dist.methods.base import AVERAGING, Group, Method, Parameters, StepNumbers, Total
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
)
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches

SLICE_P = 11
"""The reference samples every 11th element."""

ARGUMENTS: dict[str, Any] = {
    "lr": 1.0,
    "betas": (0.9, 0.99),
    "beta3": None,
    "weight_decay": 0.0,
    "weight_decay_by_lr": True,
    "d0": 1e-6,
    "d_coef": 1.0,
    "d_limiter": True,
    "prodigy_steps": 0,
    "schedulefree_c": 0,
    "eps": 1e-8,
    "split_groups": True,
    "split_groups_mean": False,
    "factored": True,
    "factored_fp32": True,
    "use_bias_correction": False,
    "use_stableadamw": True,
    "use_schedulefree": True,
    "use_speed": False,
    "stochastic_rounding": True,
    "fused_back_pass": False,
    "use_cautious": False,
    "use_grams": False,
    "use_adopt": False,
    "use_orthograd": False,
    "use_focus": False,
}
"""Defaults of a group, in the order of the reference's signature."""

OURS: dict[str, Any] = {"beta4": 0.0, "growth_rate": math.inf, "reference_quirks": True}
"""What the reference does not have."""

POOLED = ("d0", "beta3", "d_coef", "d_limiter", "prodigy_steps", "use_speed", "beta4", "growth_rate")
"""With ``split_groups=False`` one step size serves all groups: these belong to it, so all groups must agree on them."""

_BOOLEANS = (*(name for name, default in ARGUMENTS.items() if isinstance(default, bool)), "reference_quirks")
_HYPER_SWITCHES = ("d_limiter", "use_speed", "use_bias_correction", "use_schedulefree", "weight_decay_by_lr")


class ProdigyPlusNumbers(StepNumbers):
    """The numbers of one step: the length d * lr, RAdam's rectification, and d after it."""

    def _begin(self) -> None:
        super()._begin()
        h, numbers, self.d = self.hyper, self._numbers, self._numbers["d"].clone()
        d = self.d
        if self._any("split_groups_mean"):
            d = torch.where(numbers["shared_d"] > 0, numbers["shared_d"], d)
        delta = d * h["lr"]
        self.beta2, self.delta = h["beta2"], delta
        if self._any("use_bias_correction"):
            radam_beta2, rectification = second_moment.radam(self.k, h["beta2"])
            corrects = h["use_bias_correction"] > 0
            self.beta2 = torch.where(corrects, radam_beta2, h["beta2"])
            self.delta = torch.where(corrects, delta * rectification, delta)
        self.c, self.q, self._weight_sum = averaging.averaging_weight(
            self.delta, numbers["weight_sum"], h["beta1"], h["schedulefree_c"] if self._any("schedulefree_c") else None
        )
        if self._any("prodigy_steps"):
            self.adapts = (h["prodigy_steps"] == 0) | (self.k < h["prodigy_steps"])
        # What a step's sums weigh in those of d.
        self._weight = step_size.prodigy_weight(self.d, h["d0"])

    def _any(self, name: str) -> bool:
        """Whether an argument is on in any group."""
        return any(group[name] for group in self._groups)

    def _is_sound(self) -> Tensor:
        return self._numbers["d"].isfinite()

    def coefficients(self) -> dict[str, Tensor]:
        h, d, delta = self.hyper, self.d, self.delta
        one = torch.ones_like(d)
        if not all(group["weight_decay_by_lr"] for group in self._groups):
            delta = torch.where(h["weight_decay_by_lr"] > 0, delta, one)
        return super().coefficients() | {
            "d": d,
            "gain": torch.where(h["gain_is_d"] > 0, d, one),
            "d_eps": d * h["eps"],
            "momentum_weight": (1 - h["beta1"]) * torch.where(h["momentum_of_d"] > 0, d, one),
            "beta2": self.beta2,
            "square_weight": self._square_weight(self.beta2),
            "focus_correction": one,
            "clamp": self.k**0.25,
            "keep": 1 - h["weight_decay"] * delta,
            "beta3": h["beta3"],
            "s_weight": self._weight,
        }

    def _square_weight(self, beta2: Tensor, group: Any = ...) -> Tensor:
        """The weight of a square in the second moment: of d g, or of a weight under FOCUS as it was meant."""
        square = self.d * self.d
        if self._any("use_focus"):
            square = torch.where(self.hyper["focus_fixed"] > 0, 1.0, square)
        return (1 - beta2) * square[group]

    def of_parameters(self, of: Parameters) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if not (of.any_adopt or of.any_focus):
            return found
        group, beta2 = of.group_of, self.beta2[of.group_of]
        if of.any_adopt:
            # ADOPT's first step, of the group or of a parameter that comes late, only sets the second moment.
            beta2 = torch.where(of.adopt_first, 0.0, beta2)
            found |= {"beta2": beta2, "square_weight": self._square_weight(beta2, group)}
        if of.any_focus:
            fixed = self.hyper["focus_fixed"][group] > 0
            found["focus_correction"] = torch.where(fixed, 1 / (1 - beta2 ** (of.updates + 1)), 1.0)
        return found

    def contributions(self, stats: Tensor, of: Any, counted: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        def as_stored(sums: Tensor, rounds: Tensor, *, any_: bool) -> Tensor:
            return torch.where(rounds, sums.bfloat16().double(), sums) if any_ else sums

        numerator = dot = as_stored(stats[:, Stat.DOT], of.rounds_samples, any_=of.any_rounds_samples)
        denominator = as_stored(stats[:, Stat.S_L1], of.rounds_s, any_=of.any_rounds_s)
        if of.any_speed:
            speed = (self.hyper["use_speed"] > 0)[of.group_of]
            state, speed_numerator, speed_denominator = step_size.speed_contribution(
                SpeedState(*after[1:].clone()),
                dot,
                as_stored(stats[:, Stat.DELTA_L1], of.rounds_samples, any_=of.any_rounds_samples),
                as_stored(stats[:, Stat.DELTA_SQUARE].sqrt(), of.rounds_samples, any_=of.any_rounds_samples),
                self.k[of.group_of],
            )
            for row, value in zip(after[1:], vars(state).values(), strict=True):
                row.copy_(torch.where(counted & speed, value, row))
            numerator = torch.where(speed, speed_numerator, numerator)
            denominator = torch.where(speed, speed_denominator, denominator)
        return numerator, denominator

    def _adapt(self, numbers: dict[str, Tensor], totals: Tensor) -> None:
        h, first = self.hyper, self._groups[0]
        pooled = not first["split_groups"]
        adapts = self.adapts[:1].expand_as(self.d) if pooled and self.adapts is not None else self.adapts
        for name, value in {**vars(self._adapted(totals, pooled)), "d_prev": self.d}.items():
            numbers[name] = value if adapts is None else torch.where(adapts, value, numbers[name])
        weight_sum, effective_lr = self._weight_sum, h["lr"] * self.q
        moved = totals[Total.MOVED] > 0
        if not all(group["use_schedulefree"] for group in self._groups):
            # Of an average that has been switched off nothing is left.
            averages = h["use_schedulefree"] > 0
            weight_sum, effective_lr = weight_sum * averages, torch.where(averages, effective_lr, h["lr"])
            moved |= ~averages
        for name, value in (("weight_sum", weight_sum), ("effective_lr", effective_lr)):
            numbers[name] = torch.where(moved, value, numbers[name])
        if first["split_groups"] and first["split_groups_mean"]:
            numbers["shared_d"] = step_size.harmonic_mean(numbers["d"]).expand_as(self.d)

    def _adapted(self, totals: Tensor, pooled: bool) -> StepSize:
        """The step size after the step; with one for all groups, group 0's arguments and the sums of all."""
        h = self.hyper
        numerator, denominator = totals[Total.NUMERATOR] * self._weight, totals[Total.DENOMINATOR]
        if pooled:
            numerator, denominator = (x.sum().expand_as(x) for x in (numerator, denominator))
        history = (self._numbers[n] for n in ("d_numerator", "d_denom", "prev_d_numerator", "max_d_numerator"))
        rule = StepSizeRule(
            beta3=h["beta3"],
            beta4=h["beta4"] if any(group["beta4"] != 0 for group in self._groups) else None,
            growth_rate=h["growth_rate"] if any(group["growth_rate"] < math.inf for group in self._groups) else None,
            d0=h["d0"],
            d_coef=h["d_coef"],
            d_limiter=h["d_limiter"] > 0 if self._any("d_limiter") else None,
            use_speed=h["use_speed"] > 0 if self._any("use_speed") else None,
            quirks=self._groups[0]["reference_quirks"],
        )
        new = step_size.adapted(StepSize(self.d, *history), numerator, denominator, rule)
        return StepSize(*(value[:1].expand_as(value) for value in vars(new).values())) if pooled else new


class ProdigyPlus(Method):
    """What ProdigyPlusScheduleFree is."""

    name = "ProdigyPlusScheduleFree"
    arguments = {**ARGUMENTS, **OURS}
    wide = ("split_groups", "split_groups_mean", "fused_back_pass", "reference_quirks")
    rules = {
        "beta3": or_none(DECAY, "None or 0 <= beta3 < 1"),
        "beta4": or_none(DECAY, "None (for betas[1]) or 0 <= beta4 < 1, where 0 lets d never fall"),
        "growth_rate": GROWTH,
        "d0": POSITIVE,
        "d_coef": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "schedulefree_c": NOT_NEGATIVE,
        "prodigy_steps": Rule("an integer >= 0, or None, which is 0", integer(0).fits),
        "eps": or_none(POSITIVE, "a number > 0, or None for the atan2 form, which has no epsilon"),
        **{name: SWITCH for name in _BOOLEANS},
    }
    numbers = {
        "d": 0.0,
        "d_prev": 0.0,
        "d_numerator": 0.0,
        "d_denom": 0.0,
        "prev_d_numerator": 0.0,
        "max_d_numerator": 0.0,
        "weight_sum": 0.0,
        "effective_lr": 1.0,
        "shared_d": 0.0,
        "k": 1.0,
        "skipped_steps": 0.0,
    }
    number_rules = {
        "d": POSITIVE,
        "d_prev": POSITIVE,
        "d_numerator": ANY,
        "d_denom": NOT_NEGATIVE,
        "prev_d_numerator": ANY,
        "max_d_numerator": ANY,
        "weight_sum": NOT_NEGATIVE,
        "effective_lr": NOT_NEGATIVE,
        "shared_d": or_none(POSITIVE, "None or a finite number > 0"),
        "k": integer(1),
    }
    hyper = (
        "lr", "beta1", "beta2", "beta3", "beta4", "growth_rate", "weight_decay", "d0", "d_coef", "eps", "prodigy_steps",
        "schedulefree_c", "gain_is_d", "momentum_of_d", "focus_fixed", *_HYPER_SWITCHES,
    )  # fmt: skip
    coefficients = (
        *AVERAGING, "d", "d_eps", "momentum_weight", "beta2", "square_weight", "focus_correction", "clamp", "beta3",
        "s_weight",
    )  # fmt: skip
    structural = ("use_schedulefree", "use_speed", "use_focus", "factored", "factored_fp32")
    younger = tuple(OURS)
    foreign = ("optimiser_version", "running_d_numerator", "running_d_denom", "exp_avg_sq_metadata")
    interpolation = "betas[0]"
    step_numbers = ProdigyPlusNumbers
    first_lr = Rule("a finite number > 0 (1.0 unless you scale d)", POSITIVE.fits)

    def switches(self, group: Mapping[str, Any]) -> Switches:
        return Switches(
            schedulefree=group["use_schedulefree"],
            second_moment=True,
            factored=group["factored"] and not group["use_focus"],
            factored_fp32=group["factored_fp32"],
            statistics=True,
            prodigy_steps=group["prodigy_steps"],
            slice_p=SLICE_P,
            # bf16 rounds the starting point by 2^-9 (docs/differences.md, O1 and O2).
            samples="halved" if group["reference_quirks"] else "fp32",
            speed=group["use_speed"],
            weight_decay=group["weight_decay"] != 0,
            weight_decay_by_lr=group["weight_decay_by_lr"],
            atan2=group["eps"] is None,
            stableadamw=group["use_stableadamw"],
            stochastic_rounding=group["stochastic_rounding"],
            cautious=group["use_cautious"],
            grams=group["use_grams"],
            adopt=group["use_adopt"],
            orthograd=group["use_orthograd"],
            focus=group["use_focus"],
            quirks=group["reference_quirks"],
        )

    def hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        beta3 = beta2**0.5 if group["beta3"] is None else group["beta3"]
        quirks, focus = group["reference_quirks"], group["use_focus"]
        adopts_dg = group["use_adopt"] and not quirks
        numbers = {
            **group,
            "gain_is_d": group["use_schedulefree"] and group["eps"] is not None and not focus and not adopts_dg,
            "momentum_of_d": not adopts_dg,
            "focus_fixed": focus and not quirks,
            "beta1": beta1,
            "beta2": beta2,
            "beta3": beta3,
            "beta4": beta2 if group["beta4"] is None else group["beta4"],
            "growth_rate": finite_growth(group["growth_rate"]),
            "eps": group["eps"] or 0.0,
        }
        return tuple([float(numbers[name]) for name in self.hyper])

    def beta1(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][0])

    def is_frozen(self, group: Mapping[str, Any]) -> bool:
        return bool(group["prodigy_steps"] > 0 and group["k"] >= group["prodigy_steps"])

    def initial_numbers(self, group: Mapping[str, Any]) -> Group:
        d0 = float(group["d0"])
        start = {"d": d0, "d_prev": d0, "effective_lr": float(group["lr"]), "shared_d": None}
        return super().initial_numbers(group) | start

    def plain_number(self, name: str, value: float) -> float | int | None:
        return None if name == "shared_d" and value == 0 else super().plain_number(name, value)

    def validate_group(self, group: MutableMapping[str, Any], *, lr_may_be_zero: bool = True) -> None:
        check_betas(group)
        # None means never in prodigy-plus-schedule-free's first version.
        group["prodigy_steps"] = 0 if group["prodigy_steps"] is None else group["prodigy_steps"]
        super().validate_group(group, lr_may_be_zero=lr_may_be_zero)
        check_step_size("d0", group)

    def validate_numbers(self, group: MutableMapping[str, Any]) -> None:
        super().validate_numbers(group)
        check_step_size("d", group)

    def validate_together(self, groups: Sequence[Group]) -> None:
        super().validate_together(groups)
        if not groups[0]["split_groups"]:
            why = "of the one step size of all groups: give all groups the same value, or split_groups=True"
            self._agree(groups, POOLED, why)

    def refuse_foreign(self, group: Mapping[str, Any], where: str) -> None:
        if "factored" in group and "prev_d_numerator" not in group:
            raise ValueError(
                f"{where} has no 'prev_d_numerator': it was made by prodigy-plus-schedule-free 1.x, whose statistics "
                "mean something else; start a new run from the weights"
            )
        super().refuse_foreign(group, where)

    def settle(self, group: MutableMapping[str, Any]) -> list[str]:
        said: list[str] = []

        def off(name: str, reason: str) -> None:
            group[name] = False
            said.append(f"{name}=True has no effect and is switched off: {reason}")

        if (doubt := self.doubt_about_lr(float(group["lr"]))) is not None:
            said.append(doubt)
        if group["use_cautious"] and group["use_grams"]:
            off("use_grams", "use_cautious=True decides the mask")
        if group["use_focus"] and group["factored"]:
            off(
                "factored",
                "use_focus=True averages weights, which do not factor; pass factored=False to say so yourself",
            )
        if group["use_focus"] and group["eps"] is None:
            said.append("eps=None (atan2) has no effect with use_focus=True, which divides by nothing")
        if group["eps"] is None and group["use_stableadamw"]:
            off("use_stableadamw", "eps=None (atan2) bounds the update already")
        if group["use_speed"] and group["beta4"] != 0:
            said.append(f"beta4={group['beta4']} has no effect with use_speed=True, which compares d with nothing")
        if group["use_speed"] and group["weight_decay"] > 0:
            said.append("use_speed=True with weight_decay > 0 can let d grow without bound; watch d")
        beta1, beta2 = group["betas"]
        if group["use_schedulefree"] and beta1 == 0:
            said.append(
                "betas[0]=0 with use_schedulefree=True trains on z itself: the average x is lost and eval() will raise"
            )
        if group["use_bias_correction"] and beta2 <= 0.6:
            said.append(
                f"use_bias_correction=True with betas[1]={beta2} <= 0.6 never moves: RAdam's rectification stays 0"
            )
        if group["d_coef"] < 2**-0.25 and group["d_limiter"] and not group["use_speed"] and group["reference_quirks"]:
            said.append(
                f"d_coef={group['d_coef']} below 2**-0.25 with d_limiter=True: d can never grow, because the reference "
                "limits d before it multiplies by d_coef; pass d_limiter=False or reference_quirks=False"
            )
        return said


PRODIGY_PLUS = ProdigyPlus()
