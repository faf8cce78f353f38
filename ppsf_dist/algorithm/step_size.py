"""The step size d: Prodigy's estimate, and SPEED's.

Prodigy compares, on all elements of each parameter or on some, how far the gradients agree with the distance travelled
(numerator) to how large they are in sum (denominator). Mishchenko and Defazio, arXiv:2306.06101, algorithm 4.
SPEED is the reference's own replacement, described in its README.

Functions on tiles return sums; functions on vectors over groups or parameters are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GROWTH_LIMIT = 2**0.25
"""Largest factor by which d grows in one step with ``d_limiter=True``."""

SPEED_FLOOR = 1e-8
"""Smallest norms that SPEED divides by."""


def displacement(p0: Tensor, point: Tensor, stored: torch.dtype) -> Tensor:
    """``p0 - point`` on the samples (fp32).

    Args:
        p0: the starting point, in its own dtype.
        point: the current one, as fp32.
        stored: dtype in which ``point`` is stored. The difference is rounded to the wider of the two dtypes.
    """
    difference = p0.float() - point
    return difference.to(torch.promote_types(p0.dtype, stored)).float()


def gradient_sum(s: Tensor, beta3: Tensor, weight: Tensor, gradient: Tensor, stored: torch.dtype) -> Tensor:
    """``beta3 s + weight g`` on the samples, rounded to the dtype of ``s`` after each of its two operations.

    Args:
        s: the sum so far.
        beta3, weight: decay and weight (fp32).
        gradient: the sampled gradient, as fp32.
        stored: dtype in which the gradient is stored. Where it is that of ``s``, torch rounds the weight to it as well.
    """
    if stored == s.dtype:
        weight = weight.to(stored).float()
    decayed = (s.float() * beta3).to(s.dtype)
    return (decayed.float() + gradient.float() * weight).to(s.dtype)


@dataclass
class StepSize:
    """What d depends on, as vectors over groups (fp64)."""

    d: Tensor
    d_numerator: Tensor
    d_denom: Tensor
    prev_d_numerator: Tensor
    max_d_numerator: Tensor


@dataclass(frozen=True)
class StepSizeRule:
    """The arguments of the rule, as vectors over groups (fp64, or bool for switches).

    ``beta4`` is None where it is 0 for all groups, the switches are where all are off, and ``growth_rate`` where none
    has one (a single 0 is none, too).
    """

    beta3: Tensor
    beta4: Tensor | None
    growth_rate: Tensor | None
    d0: Tensor
    d_coef: Tensor
    d_limiter: Tensor | None
    use_speed: Tensor | None
    quirks: bool


def prodigy_weight(d: Tensor, d0: Tensor) -> Tensor:
    """Weight of a step's sums, ``d^2 / sqrt(d0)``."""
    return d * d / d0.sqrt()


def growth_limit(d: Tensor, d0: Tensor, growth_rate: Tensor) -> Tensor:
    """The largest step size after a step: ``d * growth_rate`` once d has left d0, and no limit for a rate of 0."""
    return torch.where((growth_rate > 0) & (d != d0), growth_rate * d, torch.inf)


def adapted(old: StepSize, numerator: Tensor, denominator: Tensor, rule: StepSizeRule) -> StepSize:
    """The step size after one step.

    Args:
        old: before the step.
        numerator, denominator: this step's weighted sums over all parameters of each group.
        rule: the groups' arguments. With beta4 > 0, d is a running average of the estimates (of d0 where they are
            below it), as in the first version of prodigy-plus-schedule-free; otherwise the largest one.
    """
    counts = (old.d > rule.d0) | (numerator > 0)
    total = rule.beta3 * old.d_numerator + torch.where(counts, numerator, 0.0)
    largest = torch.maximum(total, old.max_d_numerator)

    estimate = total / denominator
    if not rule.quirks:
        estimate = rule.d_coef * estimate
    if rule.d_limiter is not None:
        limited = torch.minimum(GROWTH_LIMIT * old.d, estimate)
        estimate = torch.where(rule.d_limiter, limited, estimate)
    if rule.quirks:
        # The reference multiplies after it has limited: d can then jump by d_coef * 2^(1/4), or never grow at all.
        estimate = rule.d_coef * estimate
    if rule.growth_rate is not None:
        estimate = torch.minimum(estimate, growth_limit(old.d, rule.d0, rule.growth_rate))
    prodigy = torch.maximum(old.d, estimate)
    if rule.beta4 is not None:
        average = rule.beta4 * old.d + (1 - rule.beta4) * torch.maximum(estimate, rule.d0)
        prodigy = torch.where(rule.beta4 > 0, average, prodigy)
    d = torch.where(denominator > 0, prodigy, old.d)
    if rule.use_speed is not None:
        d = torch.where(rule.use_speed, _speed(old, total, largest, rule), d)
    return StepSize(
        d=d,
        d_numerator=total,
        d_denom=denominator,
        prev_d_numerator=old.d_numerator,
        max_d_numerator=largest,
    )


def _speed(old: StepSize, total: Tensor, largest: Tensor, rule: StepSizeRule) -> Tensor:
    """SPEED's d: it grows by the root of what the numerator has grown by, while that is at its largest."""
    progress = (total >= largest) & (total > 0) & (old.d_numerator > 0)
    ratio = torch.where(progress, total / old.d_numerator, torch.ones_like(total)).clamp_min(0).sqrt()
    grown = old.d * ratio.clamp_max(GROWTH_LIMIT) * rule.d_coef**0.125
    if rule.growth_rate is not None:
        grown = torch.minimum(grown, growth_limit(old.d, rule.d0, rule.growth_rate))
    return torch.where(progress, torch.maximum(old.d, grown), old.d)


class GlobalStepSize(NamedTuple):
    """One step size for all groups, and what it depends on (fp64, the same in every group).

    Attributes:
        d: the step size.
        d_max: the largest estimate so far, or d0.
        d_hat: the last estimate.
        d_numerator, d_denom: the sums that it came from.
    """

    d: Tensor
    d_max: Tensor
    d_hat: Tensor
    d_numerator: Tensor
    d_denom: Tensor


def adapted_for_all(
    old: GlobalStepSize,
    numerator: Tensor,
    denominator: Tensor,
    beta3: Tensor,
    d0: Tensor,
    d_coef: Tensor,
    growth_rate: Tensor,
) -> GlobalStepSize:
    """The step size of prodigyopt from the sums of this step over all parameters.

    Args:
        old: before the step.
        numerator, denominator: the weighted sums of this step.
        beta3: decay of the numerator.
        d0, d_coef: as of the method.
        growth_rate: largest factor by which d grows in a step; 0 for no limit.
    """
    total = beta3 * old.d_numerator + numerator
    d_hat = d_coef * total / denominator
    d = torch.where(old.d == d0, torch.maximum(old.d, d_hat), old.d)
    d_max = torch.maximum(old.d_max, d_hat)
    limited = torch.where(growth_rate > 0, d * growth_rate, torch.inf)
    return GlobalStepSize(torch.minimum(d_max, limited), d_max, d_hat, total, denominator.expand_as(total))


@dataclass
class SpeedState:
    """SPEED's memory, as vectors over parameters (fp64 holding fp32 values)."""

    exp_avg_x0_dot: Tensor
    max_x0_minus_l1_norm: Tensor
    max_x0_minus_l2_norm: Tensor


def speed_contribution(
    old: SpeedState, dot: Tensor, l1: Tensor, l2: Tensor, k: Tensor
) -> tuple[SpeedState, Tensor, Tensor]:
    """SPEED's share of each parameter in its group's sums.

    Args:
        old: memory before the step; all zero where a parameter has none yet.
        dot: sum of ``g (p0 - point)`` over the samples.
        l1, l2: norms of ``p0 - point`` over the samples.
        k: 1-based step of the parameter's group.

    Returns:
        The new memory, the share in the numerator before ``prodigy_weight``, and the share in the denominator
        (which is only reported).
    """
    first = old.max_x0_minus_l1_norm == 0
    decay = 1 - k**-0.75
    average = torch.where(first, dot, decay * old.exp_avg_x0_dot + (1 - decay) * dot)
    state = SpeedState(
        exp_avg_x0_dot=average.float().double(),
        max_x0_minus_l1_norm=torch.maximum(l1, old.max_x0_minus_l1_norm.clamp_min(SPEED_FLOOR)),
        max_x0_minus_l2_norm=torch.maximum(l2, old.max_x0_minus_l2_norm.clamp_min(SPEED_FLOOR)),
    )
    share = 1 / (1 + state.max_x0_minus_l2_norm).square() * state.exp_avg_x0_dot / state.max_x0_minus_l1_norm
    return state, share, state.max_x0_minus_l2_norm


def harmonic_mean(d: Tensor) -> Tensor:
    """Harmonic mean over groups, the step size of all groups with ``split_groups_mean=True``."""
    return d.numel() / (1 / d).sum()
