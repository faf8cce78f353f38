"""What a number of a parameter group allows, and how an error says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

FP32 = torch.finfo(torch.float32)
_EXACT_INTEGERS = 2**53
"""Numbers of a group are fp64 on the device."""


class Rule(NamedTuple):
    """What a number allows: in words, and as a test of Python's own numbers."""

    allowed: str
    fits: Callable[[Any], bool]


def _real(value: Any) -> bool:
    """Whether it is a number that fp32 can hold."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= FP32.max


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _EXACT_INTEGERS


def or_none(rule: Rule, allowed: str) -> Rule:
    """The rule of what may also be None, in words of its own."""
    return Rule(allowed, lambda value: value is None or rule.fits(value))


def integer(least: int) -> Rule:
    """The rule of an integer that is at least so large."""
    return Rule(f"an integer >= {least}", lambda value: _count(value, least))


DECAY = Rule("0 <= beta < 1", lambda value: _real(value) and 0 <= value < 1)
ANY = Rule("a finite number", _real)
POSITIVE = Rule("a finite number > 0", lambda value: _real(value) and value > 0)
NOT_NEGATIVE = Rule("a finite number >= 0", lambda value: _real(value) and value >= 0)
GROWTH = Rule("a number >= 1, or inf for no limit", lambda value: value == math.inf or (_real(value) and value >= 1))
SWITCH = Rule("True or False", lambda value: isinstance(value, (bool, int)) and value in (0, 1))


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


def checked(name: str, value: Any, rule: Rule) -> Any:
    """A value as Python's own number.

    Raises:
        ValueError: it is out of range. The message names it, its value and what is allowed.
    """
    number = plain(value)
    if not rule.fits(number):
        beyond = isinstance(number, (int, float)) and FP32.max < abs(number) < math.inf
        limit = f", and at most {FP32.max:.1e} as numbers of a step are fp32" if beyond else ""
        raise ValueError(f"{name}={shown(value)} is out of range: allowed is {rule.allowed}{limit}")
    return bool(number) if rule is SWITCH else number


def check_lr(group: MutableMapping[str, Any], rule: Rule) -> None:
    """Check a group's learning rate. A tensor stays the tensor that it is: torch's schedulers write to it.

    Raises:
        ValueError: it is out of range, or a tensor of several elements.
    """
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        group["lr"] = checked("lr", lr, rule)
    elif lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element: it has shape {tuple(lr.shape)}")
    elif not lr.is_meta:
        checked("lr", lr.item(), rule)


def check_betas(group: MutableMapping[str, Any]) -> None:
    """Check a group's pair of betas, and make it a tuple of Python's own numbers.

    Raises:
        ValueError: it is no pair, or one of them is out of range.
    """
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} is out of range: allowed is a pair (beta1, beta2)")
    group["betas"] = tuple(checked(f"betas[{index}]", beta, DECAY) for index, beta in enumerate(betas))


def finite_growth(growth_rate: float) -> float:
    """A growth rate as a number of a step, which is finite: 0 for no limit."""
    return 0.0 if growth_rate == math.inf else growth_rate


def check_step_size(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a step size with which the fp32 numbers of a step overflow, or lose digits as they come near to zero."""
    value, d0, beta2, eps = group[name], group["d0"], group["betas"][1], group["eps"]
    # Of d0 itself the third number, its power of 1.5, is within fp32 wherever its square is.
    root = math.sqrt(d0) if name == "d" else 1.0
    least = math.sqrt(FP32.tiny * max(1 / (1 - beta2), root))
    most = math.sqrt(FP32.max * min(1.0, root))
    least, most = max(least, FP32.tiny / (eps or 1)), min(most, FP32.max / (eps or 1))
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
