"""Every argument of a parameter group: its type, its default, what it allows, and what it means together with others.

Names, order and defaults are those of prodigy-plus-schedule-free 2.0.1. A group is a plain dict, as in every torch
optimizer; :func:`validate_group` checks one, and :class:`Switches` is what the step reads of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

_AN_ORDINARY_LEARNING_RATE = 0.01
_A_TYPO = 0.85
"""How like an argument a key must be to be taken for it: weight_decay_mult (0.83) may be meant, use_sped (0.94) not."""

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

_FP32 = torch.finfo(torch.float32)
_EXACT_INTEGERS = 2**53
"""Numbers of a group are fp64 on the device."""


class Rule(NamedTuple):
    """What a number allows: in words, and as a test of Python's own numbers."""

    allowed: str
    fits: Callable[[Any], bool]


def _real(value: Any) -> bool:
    """Whether it is a number that fp32 can hold."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= _FP32.max


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _EXACT_INTEGERS


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_DECAY = Rule("0 <= beta < 1", lambda value: _real(value) and 0 <= value < 1)
_ANY = Rule("a finite number", _real)
_POSITIVE = Rule("a finite number > 0", lambda value: _real(value) and value > 0)
_NOT_NEGATIVE = Rule("a finite number >= 0", lambda value: _real(value) and value >= 0)
_SWITCH = Rule("True or False", lambda value: isinstance(value, (bool, int)) and value in (0, 1))

_FIRST_LR = Rule("a finite number > 0 (1.0 unless you scale d)", _POSITIVE.fits)

_RULES: dict[str, Rule] = {
    "beta3": Rule("None or 0 <= beta3 < 1", _or_none(_DECAY.fits)),
    "d0": _POSITIVE,
    "d_coef": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "schedulefree_c": _NOT_NEGATIVE,
    "prodigy_steps": Rule("an integer >= 0", lambda value: _count(value, 0)),
    "eps": Rule("a number > 0, or None for the atan2 form, which has no epsilon", _or_none(_POSITIVE.fits)),
    **{name: _SWITCH for name in _BOOLEANS},
}
"""Of the arguments that are one number or switch each."""

_NUMBER_RULES: dict[str, Rule] = {
    "d": _POSITIVE,
    "d_prev": _POSITIVE,
    "d_numerator": _ANY,
    "d_denom": _NOT_NEGATIVE,
    "prev_d_numerator": _ANY,
    "max_d_numerator": _ANY,
    "weight_sum": _NOT_NEGATIVE,
    "effective_lr": _NOT_NEGATIVE,
    "shared_d": Rule("None or a finite number > 0", _or_none(_POSITIVE.fits)),
    "k": Rule("an integer >= 1", lambda value: _count(value, 1)),
    "skipped_steps": Rule("an integer >= 0", lambda value: _count(value, 0)),
    "train_mode": _SWITCH,
}
"""Of what a group learns in a run."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Let the errors of a block say where they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} ({where})") from None


def plain(value: Any) -> Any:
    """A scalar of numpy or torch, or another real number, as Python's own; anything else as it is."""
    if getattr(value, "shape", None) == () and not getattr(value, "is_meta", False):
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def shown(value: Any) -> str:
    """A value for a message; of a long one its size."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _checked(name: str, value: Any, rule: Rule) -> Any:
    number = plain(value)
    if not rule.fits(number):
        beyond = isinstance(number, (int, float)) and _FP32.max < abs(number) < math.inf
        limit = f", and at most {_FP32.max:.1e} as numbers of a step are fp32" if beyond else ""
        raise ValueError(f"{name}={shown(value)} is out of range: allowed is {rule.allowed}{limit}")
    return bool(number) if rule is _SWITCH else number


def validate_group(group: MutableMapping[str, Any], *, lr_may_be_zero: bool = True) -> None:
    """Check the arguments of one parameter group, and make them Python's own numbers.

    Args:
        group: the group's arguments; changed in place.
        lr_may_be_zero: false for the constructor's ``lr``. A group may pause at 0, and schedules may reach it.

    Raises:
        ValueError: an argument is out of range. The message names it, its value and what is allowed.
    """
    lr, rule = group["lr"], _NOT_NEGATIVE if lr_may_be_zero else _FIRST_LR
    if not isinstance(lr, Tensor):
        group["lr"] = _checked("lr", lr, rule)
    elif lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element: it has shape {tuple(lr.shape)}")
    elif not lr.is_meta:
        # It stays the tensor that it is: torch's schedulers write to it.
        _checked("lr", lr.item(), rule)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} is out of range: allowed is a pair (beta1, beta2)")
    group["betas"] = tuple(_checked(f"betas[{index}]", beta, _DECAY) for index, beta in enumerate(betas))
    for name, rule in _RULES.items():
        group[name] = _checked(name, group[name], rule)
    _check_step_size("d0", group)


def validate_numbers(group: MutableMapping[str, Any]) -> None:
    """Check what a parameter group has learned in a run, and make it Python's own numbers. Arguments come first.

    Raises:
        ValueError: a number is out of range. The message names it, its value and what is allowed.
    """
    for name, rule in _NUMBER_RULES.items():
        group[name] = _checked(name, group[name], rule)
    _check_step_size("d", group)


def _check_step_size(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a step size with which the fp32 numbers of a step overflow, or lose digits as they come near to zero."""
    value, d0, beta2, eps = group[name], group["d0"], group["betas"][1], group["eps"]
    # Of d0 itself the third number, its power of 1.5, is within fp32 wherever its square is.
    root = math.sqrt(d0) if name == "d" else 1.0
    least = math.sqrt(_FP32.tiny * max(1 / (1 - beta2), root))
    most = math.sqrt(_FP32.max * min(1.0, root))
    least, most = max(least, _FP32.tiny / (eps or 1)), min(most, _FP32.max / (eps or 1))
    if not least <= value <= most:
        raise ValueError(
            f"{name}={value!r} is out of range: with betas[1]={beta2}, eps={eps} and d0={d0} allowed is {least:.2g} <= "
            f"{name} <= {most:.2g}, where {name}**2 * (1 - betas[1]), {name}**2 / sqrt(d0) and {name} * eps are normal "
            "numbers of fp32"
        )


def validate_seed(seed: Any) -> int:
    """The seed of stochastic rounding as a plain integer.

    Raises:
        ValueError: it is no integer in 0 <= seed < 2**64.
    """
    number = plain(seed)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**64:
        raise ValueError(f"seed={shown(seed)} is out of range: allowed is an integer >= 0, below 2**64")
    return number


def refuse_unknown(group: Mapping[str, Any], elsewhere: Iterable[str]) -> None:
    """Refuse a key of a parameter group that is an argument misspelt, or one of the whole optimizer.

    Other keys are a person's own (``name``), or a scheduler's (``initial_lr``), and stay where they are.

    Args:
        group: as it was given.
        elsewhere: names of arguments that only the constructor takes.

    Raises:
        ValueError: the message names the key and what to write in its place.
    """
    known = {*ARGUMENTS, *_NUMBER_RULES, "reference_quirks", "params", "param_names", "state_version"}
    for name in group:
        if name in elsewhere:
            raise ValueError(
                f"{name}={shown(group[name])} stands in a parameter group, but it belongs to the whole optimizer: give "
                f"it to the constructor, ProdigyPlusScheduleFree(..., {name}=)"
            )
        meant = [] if name in known else get_close_matches(str(name), ARGUMENTS, n=1, cutoff=_A_TYPO)
        if meant:
            raise ValueError(
                f"{name}={shown(group[name])} in a parameter group is no argument: did you mean {meant[0]}? A key of "
                "your own may have any name that is less like one"
            )


def settle(group: MutableMapping[str, Any]) -> list[str]:
    """Switch off what another switch of a validated group excludes.

    Returns:
        What a person should know of: what was switched off, and what is allowed but seldom meant.
    """
    said: list[str] = []

    def off(name: str, reason: str) -> None:
        group[name] = False
        said.append(f"{name}=True has no effect and is switched off: {reason}")

    if 0 < group["lr"] <= _AN_ORDINARY_LEARNING_RATE:
        said.append(
            f"lr={group['lr']} looks like the learning rate of another optimizer: here it multiplies the step size d "
            "that this one finds, so leave it at 1.0"
        )
    if group["use_cautious"] and group["use_grams"]:
        off("use_grams", "use_cautious=True decides the mask")
    if group["use_focus"] and group["factored"]:
        off("factored", "use_focus=True averages weights, which do not factor; pass factored=False to say so yourself")
    if group["use_focus"] and group["eps"] is None:
        said.append("eps=None (atan2) has no effect with use_focus=True, which divides by nothing")
    if group["eps"] is None and group["use_stableadamw"]:
        off("use_stableadamw", "eps=None (atan2) bounds the update already")
    if group["use_speed"] and group["weight_decay"] > 0:
        said.append("use_speed=True with weight_decay > 0 can let d grow without bound; watch d")
    beta1, beta2 = group["betas"]
    if group["use_schedulefree"] and beta1 == 0:
        said.append(
            "betas[0]=0 with use_schedulefree=True trains on z itself: the average x is lost and eval() will raise"
        )
    if group["use_bias_correction"] and beta2 <= 0.6:
        said.append(f"use_bias_correction=True with betas[1]={beta2} <= 0.6 never moves: RAdam's rectification stays 0")
    if group["d_coef"] < 2**-0.25 and group["d_limiter"] and not group["use_speed"] and group["reference_quirks"]:
        said.append(
            f"d_coef={group['d_coef']} below 2**-0.25 with d_limiter=True: d can never grow, because the reference "
            "limits d before it multiplies by d_coef; pass d_limiter=False or reference_quirks=False"
        )
    return said


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
