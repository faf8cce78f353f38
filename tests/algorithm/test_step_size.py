"""The step size d."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ppsf_dist.algorithm import step_size
from ppsf_dist.algorithm.step_size import GROWTH_LIMIT, StepSize, StepSizeRule, adapted

D0 = 1e-6


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


OLD = StepSize(number(2 * D0), number(1), number(1), number(0), number(1))
RULE = StepSizeRule(
    beta3=number(0.9), beta4=number(0), growth_rate=number(0), d0=number(D0), d_coef=number(1),
    d_limiter=torch.tensor([True]), use_speed=torch.tensor([False]), quirks=True,
)  # fmt: skip


def d_after(numerator: float, denominator: float, rule: StepSizeRule = RULE, old: StepSize = OLD) -> float:
    return float(adapted(old, number(numerator), number(denominator), rule).d)


def test_d_never_shrinks() -> None:
    assert d_after(-5, 1) == 2 * D0
    assert d_after(1, 0) == 2 * D0


def test_growth_is_limited_unless_it_is_told_not_to_be() -> None:
    assert d_after(1, 1) == pytest.approx(2 * D0 * GROWTH_LIMIT)
    assert d_after(1, 1, replace(RULE, d_limiter=torch.tensor([False]))) == pytest.approx(1.9)


def test_below_the_limit_d_is_the_estimate() -> None:
    assert d_after(0.1, 1 / (2.2 * D0)) == pytest.approx(2.2 * D0)


def test_d_coef_counts_after_the_limit_with_quirks_and_before_it_without() -> None:
    rule = replace(RULE, d_coef=number(3))
    assert d_after(1, 1, rule) == pytest.approx(6 * D0 * GROWTH_LIMIT)
    assert d_after(1, 1, replace(rule, quirks=False)) == pytest.approx(2 * D0 * GROWTH_LIMIT)


def test_a_negative_numerator_counts_only_above_d0() -> None:
    at_start = replace(OLD, d=number(D0))
    assert float(adapted(at_start, number(-1), number(1), RULE).d_numerator) == pytest.approx(0.9)
    assert float(adapted(OLD, number(-1), number(1), RULE).d_numerator) == pytest.approx(-0.1)


def test_speed_grows_with_the_root_of_its_progress_up_to_the_limit() -> None:
    rule = replace(RULE, use_speed=torch.tensor([True]))
    assert d_after(0.3, 1, rule) == pytest.approx(2 * D0 * 1.2**0.5)
    assert d_after(9, 1, rule) == pytest.approx(2 * D0 * GROWTH_LIMIT)
    assert d_after(0.05, 1, rule) == 2 * D0


def test_small_forms() -> None:
    assert float(step_size.prodigy_weight(number(4), number(16))) == 4
    assert float(step_size.harmonic_mean(torch.tensor([1.0, 3.0]))) == pytest.approx(1.5)


def test_samples_are_rounded_to_their_dtype() -> None:
    p0 = torch.tensor([1.0], dtype=torch.bfloat16)
    point = torch.tensor([2**-12])
    assert float(step_size.displacement(p0, point, torch.bfloat16)) == 1
    assert float(step_size.displacement(p0, point, torch.float32)) == 1 - 2**-12
    s = step_size.gradient_sum(p0, torch.tensor(0.5), torch.tensor(2.0), torch.tensor([3.0]), torch.float32)
    assert float(s) == 6.5 and s.dtype == torch.bfloat16


def test_with_beta4_d_is_the_running_average_of_its_estimates_and_may_fall() -> None:
    rule = replace(RULE, beta4=number(0.75), d_limiter=torch.tensor([False]))
    assert d_after(0.1, 1, rule) == pytest.approx(0.75 * 2 * D0 + 0.25)
    assert d_after(-0.9 + 1.2 * D0, 1, rule) == pytest.approx((0.75 * 2 + 0.25 * 1.2) * D0)
    assert d_after(1, 1, replace(RULE, beta4=number(0.75))) == pytest.approx(2 * D0 * (0.75 + 0.25 * GROWTH_LIMIT))


def test_with_beta4_estimates_below_d0_count_as_d0_and_a_step_without_any_as_none() -> None:
    rule = replace(RULE, beta4=number(0.75))
    assert d_after(-5, 1, rule) == pytest.approx(1.75 * D0)
    assert d_after(1, 0, rule) == 2 * D0


@pytest.mark.parametrize("use_speed", [False, True])
def test_growth_rate_limits_d_once_it_has_left_d0(use_speed: bool) -> None:
    off = torch.tensor([False])
    rule = replace(RULE, growth_rate=number(1.02), d_limiter=off, use_speed=torch.tensor([use_speed]), d_coef=number(3))
    assert d_after(1, 1, rule) == pytest.approx(2 * D0 * 1.02)
    at_start = replace(OLD, d=number(D0))
    assert d_after(1, 1, rule, at_start) > 1.1 * D0
    assert d_after(1, 1, replace(rule, growth_rate=number(1)), OLD) == 2 * D0
