"""Every argument of a parameter group: its type, its default, what it allows, and what it means together with others.

Names, order and defaults are those of prodigy-plus-schedule-free 2.0.1. A group is a plain dict, as in every torch
optimizer; :func:`validate_group` checks one, and :class:`Switches` is what the step reads of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_AN_ORDINARY_LEARNING_RATE = 0.01

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

OPTIMIZER_WIDE = ("split_groups", "split_groups_mean", "fused_back_pass", "reference_quirks")
"""Arguments that decide how groups act together, so all groups must agree on them."""

POOLED = ("d0", "beta3", "d_coef", "d_limiter", "prodigy_steps", "use_speed")
"""With ``split_groups=False`` one step size serves all groups: these belong to it, so all groups must agree on them."""

_BOOLEANS = (*(name for name, default in ARGUMENTS.items() if isinstance(default, bool)), "reference_quirks")


def _finite_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is out of range: allowed is {allowed}")


def validate_group(group: MutableMapping[str, Any], *, lr_may_be_zero: bool = True) -> None:
    """Check one parameter group and settle the combinations that exclude each other, with a warning for each.

    Args:
        group: the group's arguments; changed in place where a combination has to be settled.
        lr_may_be_zero: false for the constructor's ``lr``. A group may pause at 0, and schedules may reach it.

    Raises:
        ValueError: an argument is out of range. The message names it, its value and what is allowed.
    """
    lr = group["lr"]
    # torch's schedulers may put a tensor of one element here.
    lr_number = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    if lr_may_be_zero:
        _require(_finite_number(lr_number) and lr_number >= 0, "lr", lr, "a finite number >= 0")
    else:
        _require(_finite_number(lr_number) and lr_number > 0, "lr", lr, "a finite number > 0 (1.0 unless you scale d)")
    betas = group["betas"]
    _require(isinstance(betas, (tuple, list)) and len(betas) == 2, "betas", betas, "a pair (beta1, beta2)")
    group["betas"] = (betas[0], betas[1])
    for index, beta in enumerate(group["betas"]):
        _require(_finite_number(beta) and 0 <= beta < 1, f"betas[{index}]", beta, "0 <= beta < 1")
    beta3 = group["beta3"]
    _require(beta3 is None or (_finite_number(beta3) and 0 <= beta3 < 1), "beta3", beta3, "None or 0 <= beta3 < 1")
    for name in ("d0", "d_coef"):
        _require(_finite_number(group[name]) and group[name] > 0, name, group[name], "a finite number > 0")
    for name in ("weight_decay", "schedulefree_c"):
        _require(_finite_number(group[name]) and group[name] >= 0, name, group[name], "a finite number >= 0")
    steps = group["prodigy_steps"]
    _require(
        isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0, "prodigy_steps", steps, "an integer >= 0"
    )
    eps = group["eps"]
    _require(
        eps is None or (_finite_number(eps) and eps > 0),
        "eps",
        eps,
        "a number > 0, or None for the atan2 form, which has no epsilon",
    )
    for name in _BOOLEANS:
        _require(isinstance(group[name], (bool, int)) and group[name] in (0, 1), name, group[name], "True or False")
        group[name] = bool(group[name])
    _settle(group)


def validate_seed(seed: Any) -> None:
    """Check the seed of stochastic rounding.

    Raises:
        ValueError: it is not an integer >= 0.
    """
    _require(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0, "seed", seed, "an integer >= 0")


def _settle(group: MutableMapping[str, Any]) -> None:
    """Switch off what another switch excludes, and say so."""

    def off(name: str, reason: str) -> None:
        group[name] = False
        warnings.warn(f"{name}=True has no effect and is switched off: {reason}", UserWarning, stacklevel=5)

    if 0 < group["lr"] <= _AN_ORDINARY_LEARNING_RATE:
        warnings.warn(
            f"lr={group['lr']} looks like the learning rate of another optimizer: here it multiplies the step size d "
            "that this one finds, so leave it at 1.0",
            stacklevel=4,
        )
    if group["use_cautious"] and group["use_grams"]:
        off("use_grams", "use_cautious=True decides the mask")
    if group["use_focus"] and group["factored"]:
        off("factored", "use_focus=True averages weights, which do not factor; pass factored=False to say so yourself")
    if group["use_focus"] and group["eps"] is None:
        warnings.warn("eps=None (atan2) has no effect with use_focus=True, which divides by nothing", stacklevel=4)
    if group["eps"] is None and group["use_stableadamw"]:
        off("use_stableadamw", "eps=None (atan2) bounds the update already")
    if group["use_speed"] and group["weight_decay"] > 0:
        warnings.warn("use_speed=True with weight_decay > 0 can let d grow without bound; watch d", stacklevel=4)
    beta1, beta2 = group["betas"]
    if group["use_schedulefree"] and beta1 == 0:
        warnings.warn(
            "betas[0]=0 with use_schedulefree=True trains on z itself: the average x is lost and eval() will raise",
            stacklevel=4,
        )
    if group["use_bias_correction"] and beta2 <= 0.6:
        warnings.warn(
            f"use_bias_correction=True with betas[1]={beta2} <= 0.6 never moves: RAdam's rectification stays 0",
            stacklevel=4,
        )
    if group["d_coef"] < 2**-0.25 and group["d_limiter"] and not group["use_speed"] and group["reference_quirks"]:
        warnings.warn(
            f"d_coef={group['d_coef']} below 2**-0.25 with d_limiter=True: d can never grow, because the reference "
            "limits d before it multiplies by d_coef; pass d_limiter=False or reference_quirks=False",
            stacklevel=4,
        )


def validate_together(groups: list[dict[str, Any]]) -> None:
    """Check that the groups of one optimizer agree where they must.

    Raises:
        ValueError: two groups differ in an argument that belongs to the whole optimizer, or, with
            ``split_groups=False``, in one that belongs to the single step size they share.
    """
    names = OPTIMIZER_WIDE + (() if groups[0]["split_groups"] else POOLED)
    for name in names:
        for index, group in enumerate(groups[1:], start=1):
            if group[name] != groups[0][name]:
                why = "of the whole optimizer" if name in OPTIMIZER_WIDE else "of the one step size of all groups"
                raise ValueError(
                    f"{name} is {groups[0][name]!r} in group 0 and {group[name]!r} in group {index}, but it is a "
                    f"property {why}: give all groups the same value"
                    + ("" if name in OPTIMIZER_WIDE else ", or split_groups=True")
                )


@dataclass(frozen=True)
class Switches:
    """What of a group decides which formulas run: equal switches can be computed together.

    Numbers that only scale a formula (lr, betas, d, ...) are not here: they are read from the device.
    """

    weight_decay: bool
    weight_decay_by_lr: bool
    atan2: bool
    factored: bool
    factored_fp32: bool
    stableadamw: bool
    schedulefree: bool
    speed: bool
    stochastic_rounding: bool
    cautious: bool
    grams: bool
    adopt: bool
    orthograd: bool
    focus: bool
    statistics: bool
    quirks: bool

    @classmethod
    def of(cls, group: Mapping[str, Any], *, statistics: bool) -> Switches:
        """Read a validated group. ``statistics`` is false once ``prodigy_steps`` has frozen its step size."""
        return cls(
            weight_decay=group["weight_decay"] != 0,
            weight_decay_by_lr=group["weight_decay_by_lr"],
            atan2=group["eps"] is None,
            factored=group["factored"] and not group["use_focus"],
            factored_fp32=group["factored_fp32"],
            stableadamw=group["use_stableadamw"],
            schedulefree=group["use_schedulefree"],
            speed=group["use_speed"],
            stochastic_rounding=group["stochastic_rounding"],
            cautious=group["use_cautious"],
            grams=group["use_grams"],
            adopt=group["use_adopt"],
            orthograd=group["use_orthograd"],
            focus=group["use_focus"],
            statistics=statistics,
            quirks=group["reference_quirks"],
        )

    @property
    def masks_update(self) -> bool:
        """The schedule-free forms of cautious and Grams rewrite the step of y as a whole."""
        return self.schedulefree and (self.cautious or self.grams)

    @property
    def counts_mask_early(self) -> bool:
        """Without schedule-free the cautious mask compares g with m: it needs nothing of this step's reductions."""
        return self.cautious and not self.schedulefree

    @property
    def counts_mask_late(self) -> bool:
        """With schedule-free the cautious mask compares the finished update with the step of y: a third reduction."""
        return self.cautious and self.schedulefree

    @property
    def needs_norms(self) -> bool:
        """The update's size or its angle with the weights is needed before anything is written (pass 2)."""
        return self.stableadamw or self.orthograd
