"""The sisters of ProdigyPlusScheduleFree: their references, and arguments that meet every formula of theirs."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import prodigyopt
import schedulefree

from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.runs import make_groups, make_other


@dataclass(frozen=True)
class Member:
    """An optimizer of the package that has a reference of its own.

    Attributes:
        reference: the class that it is to equal.
        variants: arguments.
        numbers: of a group, that both have.
        collectives: of a step on shards.
        evaluates: whether ``eval()`` and ``train()`` do anything.
    """

    reference: Any
    variants: dict[str, dict[str, Any]]
    numbers: tuple[str, ...]
    collectives: int = 1
    evaluates: bool = True


D0 = {"d0": 1e-4}
SCHEDULEFREE = ("k", "weight_sum", "lr_max", "scheduled_lr")

FAMILY: dict[str, Member] = {
    "SGDScheduleFree": Member(
        schedulefree.SGDScheduleFree,
        {
            "default": {"lr": 0.1},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "warmup": {"lr": 0.1, "warmup_steps": 4},
            "powers": {"lr": 0.1, "momentum": 0.95, "r": 1.5, "weight_lr_power": 1.0},
        },
        SCHEDULEFREE,
    ),
    "SGDScheduleFreeClosure": Member(
        schedulefree.SGDScheduleFreeClosure,
        {"default": {"lr": 0.1, "momentum": 0.95}, "decay": {"lr": 0.1, "weight_decay": 0.1, "warmup_steps": 4}},
        SCHEDULEFREE,
        evaluates=False,
    ),
    "AdamWScheduleFreeClosure": Member(
        schedulefree.AdamWScheduleFreeClosure,
        {"default": {"lr": 0.01}, "decay": {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 4, "r": 1.0}},
        SCHEDULEFREE,
        evaluates=False,
    ),
    "RAdamScheduleFreeClosure": Member(
        schedulefree.RAdamScheduleFreeClosure,
        {
            "default": {"lr": 0.01, "betas": (0.9, 0.99)},
            "sgd_phase": {"lr": 0.01, "silent_sgd_phase": False, "weight_decay": 0.1},
        },
        SCHEDULEFREE,
        evaluates=False,
    ),
    "AdamWScheduleFree": Member(
        schedulefree.AdamWScheduleFree,
        {
            "default": {"lr": 0.01},
            "decay": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.95, 0.99)},
            "eps": {"lr": 0.01, "eps": 1e-3},
            "warmup": {"lr": 0.01, "warmup_steps": 4, "r": 1.0, "weight_lr_power": 1.0},
        },
        SCHEDULEFREE,
    ),
    "RAdamScheduleFree": Member(
        schedulefree.RAdamScheduleFree,
        {
            "default": {"lr": 0.01, "betas": (0.9, 0.99)},
            "sgd_phase": {"lr": 0.01, "silent_sgd_phase": False},
            "decay": {"lr": 0.01, "weight_decay": 0.1, "silent_sgd_phase": False, "r": 1.0},
        },
        SCHEDULEFREE,
    ),
    "Prodigy": Member(
        prodigyopt.Prodigy,
        {
            "default": D0,
            "betas": D0 | {"betas": (0.8, 0.9)},
            "beta1_zero": D0 | {"betas": (0.0, 0.99)},
            "beta3": D0 | {"beta3": 0.9},
            "decay": D0 | {"weight_decay": 0.1},
            "coupled_decay": D0 | {"weight_decay": 0.01, "decouple": False},
            # With the default eps a step without momentum is nearly the sign of g + decay * p, where these cancel too.
            "coupled_beta1_zero": D0 | {"weight_decay": 0.01, "decouple": False, "betas": (0.0, 0.99), "eps": 1e-3},
            "bias_correction": D0 | {"use_bias_correction": True},
            "safeguard": D0 | {"safeguard_warmup": True, "lr": 0.5},
            "growth_rate": D0 | {"growth_rate": 1.02},
            "d_coef": D0 | {"d_coef": 0.5},
            "sliced": D0 | {"slice_p": 11},
        },
        ("k", "d", "d_max", "d_hat", "d_numerator", "d_denom"),
        evaluates=False,
    ),
}

EVERY_VARIANT = [(name, variant) for name, member in FAMILY.items() for variant in member.variants]


def make(name: str, variant: str, parameters: dict[str, Any], groups: int = 2) -> DistributedOptimizer:
    return make_other(name, parameters, groups, **FAMILY[name].variants[variant])


def make_reference(name: str, variant: str, parameters: dict[str, Any], groups: int = 2) -> Any:
    """The reference on the same groups; what it prints is dropped."""
    member = FAMILY[name]
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = member.reference(make_groups(parameters, groups), **member.variants[variant])
    if member.evaluates:
        optimizer.train()
    return optimizer
