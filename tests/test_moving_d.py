"""``beta4`` and ``growth_rate``: d against its recurrence, written here in plain numbers.

That it does not depend on the layout: the switches ``moving_d`` and ``growth_rate`` of ``tests/switches.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ppsf_dist import ProdigyPlusScheduleFree
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.runs import make_groups

STEPS = 25
SHAPES = named_shapes("small")
LIMIT = 2**0.25


def training(**arguments: Any) -> tuple[list[dict[str, float]], ProdigyPlusScheduleFree]:
    """What group 0 held after each step: gradients agree with the movement at first, and then oppose it."""
    parameters = {name: nn.Parameter(value) for name, value in initial_weights(SHAPES).items()}
    optimizer = ProdigyPlusScheduleFree(make_groups(parameters, 1), d0=D0, **arguments)
    history = [dict(optimizer.param_groups[0])]
    gradients = {name: g for name, g in next(iter(gradient_sequence(SHAPES, 1))).items() if g is not None}
    for step in range(STEPS):
        for name, p in parameters.items():
            p.grad = gradients[name] * (1.0 if step < 10 else -5.0)
        optimizer.step()
        history.append(dict(optimizer.param_groups[0]))
    return history, optimizer


@pytest.mark.parametrize("beta4", [0.0, 0.5, 0.99, None])
@pytest.mark.parametrize("growth_rate", [1.02, math.inf])
@pytest.mark.parametrize("d_limiter", [True, False])
@pytest.mark.parametrize(("d_coef", "quirks"), [(1.0, True), (1.5, False)])
def test_d_is_what_its_sums_say(
    beta4: float | None, growth_rate: float, d_limiter: bool, d_coef: float, quirks: bool
) -> None:
    history, _ = training(
        beta4=beta4, growth_rate=growth_rate, d_limiter=d_limiter, d_coef=d_coef, reference_quirks=quirks
    )
    decay = 0.99 if beta4 is None else beta4
    for before, after in zip(history, history[1:], strict=False):
        d = before["d"]
        estimate = d_coef * after["d_numerator"] / after["d_denom"]
        if d_limiter:
            estimate = min(estimate, LIMIT * d)
        if d != D0:
            estimate = min(estimate, growth_rate * d)
        expected = decay * d + (1 - decay) * max(estimate, D0) if decay else max(d, estimate)
        assert after["d"] == pytest.approx(expected, rel=1e-12)
    values = [numbers["d"] for numbers in history]
    assert max(values) > D0
    falls = any(later < earlier for earlier, later in zip(values, values[1:], strict=False))
    assert falls == (decay > 0)


def test_beta4_none_is_beta2() -> None:
    taken, given = (training(betas=(0.9, 0.9), beta4=beta4)[0][-1]["d"] for beta4 in (None, 0.9))
    assert taken == given != training(betas=(0.9, 0.9), beta4=0.0)[0][-1]["d"]


def test_prodigy_steps_none_is_never() -> None:
    never, zero = (training(prodigy_steps=steps)[1] for steps in (None, 0))
    assert never.param_groups[0]["prodigy_steps"] == 0
    assert never.param_groups[0]["d"] == zero.param_groups[0]["d"] > D0


def test_a_frozen_d_moves_neither_way() -> None:
    history, _ = training(beta4=0.5, prodigy_steps=8)
    assert history[7]["d"] != D0 and len({numbers["d"] for numbers in history[8:]}) == 1


def test_a_checkpoint_carries_them_and_with_one_of_before_they_stay_the_optimizers() -> None:
    _, made = training(beta4=0.9, growth_rate=math.inf)
    state_dict = made.state_dict()
    _, other = training()
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["beta4"] == 0.9 and other.param_groups[0]["growth_rate"] == math.inf
    for group in state_dict["param_groups"]:
        del group["beta4"], group["growth_rate"]
    _, third = training(beta4=0.5, growth_rate=2.0)
    third.load_state_dict(state_dict)
    assert third.param_groups[0]["beta4"] == 0.5 and third.param_groups[0]["growth_rate"] == 2.0


def test_beta4_with_speed_says_that_it_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="beta4=0.9 has no effect with use_speed=True"):
        ProdigyPlusScheduleFree([nn.Parameter(torch.ones(2))], beta4=0.9, use_speed=True)
