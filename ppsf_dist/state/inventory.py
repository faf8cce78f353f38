"""What state there is: the one list that plans, checkpoints, forecasts, comparisons and ZeRO's packing read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from ppsf_dist.algorithm.second_moment import factoring
from ppsf_dist.methods.switches import Switches


class Lies(Enum):
    """How a piece of state lies."""

    LIKE_PARAMETER = "like the parameter"
    REPLICATED = "whole on every rank that holds a piece of the parameter"
    SAMPLED = "one value for each sampled element, beside the shard; in a checkpoint by rows of the parameter"


class Holds(Enum):
    """What the values of a piece of state are, which decides what a checkpoint may hold."""

    POINT = "a point, or an average of points: whatever the weights held"
    SUM = "a sum of gradients: finite"
    SQUARES = "a mean of squares: finite, and not negative (under FOCUS of weights, which may be anything)"


@dataclass(frozen=True)
class Entry:
    """One tensor of a parameter's state.

    Attributes:
        name: its key.
        lies: how it lies.
        holds: what it holds.
        needed: whether switches ask for it, given whether the parameter is factored.
        dtype: of its values, from that of the weights.
    """

    name: str
    lies: Lies
    holds: Holds
    needed: Callable[[Switches, bool], bool]
    dtype: Callable[[torch.dtype, Switches], torch.dtype]


def _of_weights(weights: torch.dtype, switches: Switches) -> torch.dtype:
    return weights


def _of_factors(weights: torch.dtype, switches: Switches) -> torch.dtype:
    return torch.float32


def _of_samples(weights: torch.dtype, switches: Switches) -> torch.dtype:
    if switches.samples == "fp32":
        return torch.float32
    halved = switches.samples == "halved" and weights == torch.float32
    return torch.bfloat16 if halved else weights


def _is_factored(switches: Switches, factored: bool) -> bool:
    return switches.second_moment and factored


TENSORS = (
    Entry("z", Lies.LIKE_PARAMETER, Holds.POINT, lambda s, _: s.schedulefree, _of_weights),
    Entry("exp_avg", Lies.LIKE_PARAMETER, Holds.SUM, lambda s, _: not s.schedulefree and s.momentum, _of_weights),
    Entry("exp_avg_sq", Lies.LIKE_PARAMETER, Holds.SQUARES, lambda s, f: s.second_moment and not f, _of_weights),
    Entry("exp_avg_sq_row", Lies.REPLICATED, Holds.SQUARES, _is_factored, _of_factors),
    Entry("exp_avg_sq_col", Lies.REPLICATED, Holds.SQUARES, _is_factored, _of_factors),
    Entry("p0", Lies.SAMPLED, Holds.POINT, lambda s, _: s.statistics, _of_samples),
    Entry("s", Lies.SAMPLED, Holds.SUM, lambda s, _: s.statistics and not s.speed, _of_samples),
    # While weights are the average: the training weights, where those are kept.
    Entry("y", Lies.LIKE_PARAMETER, Holds.POINT, lambda s, _: False, _of_weights),
)
"""Every tensor that any method keeps for a parameter."""

PARAMETER_NUMBERS = ("step", "exp_avg_x0_dot", "max_x0_minus_l1_norm", "max_x0_minus_l2_norm")
"""Every number that any method keeps for a parameter: how many updates it has had, and SPEED's memory."""

SIGNED = "exp_avg_x0_dot"
"""The one of these that may be negative."""


def numbers_of(switches: Switches) -> tuple[str, ...]:
    """The numbers that a parameter of a method with these switches keeps."""
    return PARAMETER_NUMBERS if switches.statistics else PARAMETER_NUMBERS[:1]


def _names(lies: Lies) -> tuple[str, ...]:
    return tuple(entry.name for entry in TENSORS if entry.lies is lies)


LIKE_PARAMETER, REPLICATED, SAMPLED = _names(Lies.LIKE_PARAMETER), _names(Lies.REPLICATED), _names(Lies.SAMPLED)


def needed(switches: Switches, shape: Sequence[int]) -> Iterator[Entry]:
    """What a parameter of a shape keeps under switches."""
    factored = switches.factored and factoring(shape) is not None
    return (entry for entry in TENSORS if entry.needed(switches, factored))
