"""Moving on in the middle of a run (docs/moving.md): what is defined, on every layout, and what is an error."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppsf_dist
from ppsf_dist import AdamWScheduleFree, Prodigy, ProdigyPlusScheduleFree
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.reference import close
from tests.runs import make_optimizer, take_step

SHAPES = named_shapes("small")
STEPS = 10
CLASSES = [
    "ProdigyPlusScheduleFree", "Prodigy", "AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree",
    "AdamWScheduleFreeClosure", "SGDScheduleFreeClosure", "RAdamScheduleFreeClosure",
]  # fmt: skip


def off_and_on(layout: str, at_the_average: bool) -> tuple[dict[str, Tensor], list[list[str]], list[float]]:
    """Averaging until step 4, momentum until step 7, averaging again."""
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout])
    optimizer = make_optimizer(parameters, 2)
    kept, d = [], []
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if step in (4, 7):
            if at_the_average:
                optimizer.eval()
            for group in optimizer.param_groups:
                group["use_schedulefree"] = step == 7
            optimizer.train()
        take_step(optimizer, parameters, gradients)
        kept.append(sorted({"z", "exp_avg"}.intersection(*[optimizer.state[p] for p in parameters.values()])))
        d.append(optimizer.get_d_estimate())
    assert optimizer.skipped_steps == 0
    return gather(parameters), kept, d


@functools.cache
def single(at_the_average: bool) -> tuple[dict[str, Tensor], list[list[str]], list[float]]:
    return off_and_on("single", at_the_average)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["fsdp_3", "hsdp_2x2", "fsdp_tp_2x2", "replicated"])
@pytest.mark.parametrize("at_the_average", [True, False])
def test_averaging_goes_off_and_on_alike_on_every_layout(layout: str, at_the_average: bool) -> None:
    weights, kept, d = single(at_the_average)
    assert kept == [["z"]] * 4 + [["exp_avg"]] * 3 + [["z"]] * 3
    for theirs, kept_there, d_there in run(LAYOUTS[layout].world_size, off_and_on, layout, at_the_average):
        assert kept_there == kept and d_there == pytest.approx(d, rel=3e-6)
        assert all(close(theirs[name], value) for name, value in weights.items())


def trained(steps: int = 4, **switches: Any) -> tuple[nn.Parameter, ProdigyPlusScheduleFree]:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(40, 33))
    optimizer = ProdigyPlusScheduleFree([p], d0=D0, **switches)
    for _ in range(steps):
        p.grad = p.detach() + 0.1 * torch.randn(40, 33)
        optimizer.step()
    return p, optimizer


def test_the_run_goes_on_from_the_average_if_it_is_in_the_weights_and_else_from_where_it_was() -> None:
    p, optimizer = trained()
    y = p.detach().clone()
    optimizer.eval()
    x = p.detach().clone()
    assert not torch.equal(x, y)
    optimizer.param_groups[0]["use_schedulefree"] = False
    optimizer.train()
    assert torch.equal(p, x)
    p, optimizer = trained()
    optimizer.param_groups[0]["use_schedulefree"] = False
    optimizer.train()
    assert torch.equal(p, y)


def test_a_new_average_begins_where_the_weights_are() -> None:
    p, optimizer = trained()
    group = optimizer.param_groups[0]
    group["use_schedulefree"] = False
    optimizer.step()
    assert group["weight_sum"] == 0.0
    group["use_schedulefree"] = True
    optimizer.step()
    # The first step of an average is all of it: x = z.
    optimizer.eval()
    assert close(p.detach(), optimizer.state[p]["z"])


def test_momentum_does_not_go_on_from_what_it_was_before_the_average() -> None:
    p, optimizer = trained(use_schedulefree=False)
    group = optimizer.param_groups[0]
    for value in (True, False):
        group["use_schedulefree"] = value
        optimizer.step()
    d, beta1 = group["d_prev"], group["betas"][0]
    assert p.grad is not None
    expected = (1 - beta1) * d * p.grad
    assert torch.allclose(optimizer.state[p]["exp_avg"], expected, rtol=1e-5)


def test_d_freezes_in_mid_run_and_its_memory_is_freed() -> None:
    p, optimizer = trained()
    group = optimizer.param_groups[0]
    group["prodigy_steps"] = group["k"]
    d = group["d"]
    for _ in range(3):
        optimizer.step()
    assert group["d"] == d > D0 and not {"p0", "s"} & set(optimizer.state[p])


def test_prodigys_d_freezes_with_a_growth_rate_of_one() -> None:
    p = nn.Parameter(torch.ones(9))
    optimizer = Prodigy([p], d0=1e-3)
    d = []
    for step in range(6):
        if step == 3:
            optimizer.param_groups[0]["growth_rate"] = 1.0
        p.grad = p.detach().clone()
        optimizer.step()
        d.append(optimizer.get_d_estimate())
    assert d[1] < d[2] == d[3] == d[5]


CANNOT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "thaw": ({"prodigy_steps": 2}, {"prodigy_steps": 0}, "'p0'.*d compares where a run is with where it began"),
    "unfactored": ({}, {"factored": False}, "'exp_avg_sq'.*divided by a mean that starts at zero"),
    "factored": ({"factored": False}, {"factored": True}, "'exp_avg_sq_row'.*divided by a mean"),
    "speed_off": ({"use_speed": True}, {"use_speed": False}, "'s'.*a ratio of two sums"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_change_is_an_error_and_changes_nothing(case: str) -> None:
    before, change, message = CANNOT[case]
    p, optimizer = trained(**before)
    group = optimizer.param_groups[0]
    weights, entries, k = p.detach().clone(), set(optimizer.state[p]), group["k"]
    group |= change
    with pytest.raises(ValueError, match=f"has been stepped without {message}"):
        optimizer.step()
    assert torch.equal(p, weights) and set(optimizer.state[p]) == entries and group["k"] == k
    group |= {name: before.get(name, {"prodigy_steps": 0, "factored": True}.get(name, False)) for name in change}
    optimizer.step()
    assert group["k"] == k + 1


@pytest.mark.parametrize("focus", [False, True])
def test_focus_cannot_change_where_its_state_has_the_same_name(focus: bool) -> None:
    p, optimizer = trained(factored=False, use_focus=focus)
    group = optimizer.param_groups[0]
    weights, k = p.detach().clone(), group["k"]
    group["use_focus"] = not focus
    with pytest.raises(ValueError, match=f"use_focus of parameter group 0 has changed from {focus} to {not focus}"):
        optimizer.step()
    assert torch.equal(p, weights) and group["k"] == k
    group["use_focus"] = focus
    optimizer.step()
    assert group["k"] == k + 1


def made(name: str) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.linspace(-1, 1, 40 * 33).view(40, 33))
    optimizer = getattr(ppsf_dist, name)([p])
    for _ in range(3):
        take_step(optimizer, {"p": p}, {"p": torch.ones(40, 33)})
    return p, optimizer


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(CLASSES, 2)))
def test_state_moves_between_a_class_and_its_closure_form_and_nowhere_else(one: str, other: str) -> None:
    p, optimizer = made(one)
    q, receiver = made(other)
    weights, numbers = q.detach().clone(), dict(receiver.param_groups[0])
    state_dict = optimizer.state_dict()
    if one.removesuffix("Closure") != other.removesuffix("Closure"):
        with pytest.raises(ValueError, match=f"it was not made by {other}, .*a new {other} on them"):
            receiver.load_state_dict(state_dict)
        assert torch.equal(q, weights) and receiver.param_groups[0] == numbers
        return
    q.data.copy_(p)
    receiver.load_state_dict(state_dict)
    # After a closure form the weights are the average, and the other one is told to go back to the training weights.
    receiver.train()
    for parameter, of in ((p, optimizer), (q, receiver)):
        take_step(of, {"p": parameter}, {"p": torch.ones(40, 33)})
        of.eval()
    assert close(q.detach(), p.detach())


def test_a_new_class_on_the_average_starts_from_the_d_that_was_found() -> None:
    p, optimizer = trained()
    optimizer.eval()
    x, d = p.detach().clone(), optimizer.get_d_estimate()
    after = Prodigy([p], d0=d)
    assert torch.equal(p, x) and after.get_d_estimate() == d > D0
    AdamWScheduleFree([p], lr=d)


def goes_off_on_one_rank(layout: str) -> str:
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout])
    optimizer = make_optimizer(parameters)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 3)):
        set_grads(parameters, gradients)
        if step == 2 and torch.distributed.get_rank() == 1:
            optimizer.param_groups[0]["use_schedulefree"] = False
        try:
            optimizer.step()
        except RuntimeError as error:
            assert all("z" in optimizer.state[p] for p in parameters.values())
            return str(error)
    return ""


@pytest.mark.dist
def test_averaging_that_goes_off_on_one_rank_alone_is_an_error_on_all() -> None:
    for error in run(2, goes_off_on_one_rank, "fsdp_2"):
        assert "rank 1: schedulefree of parameter group 0 has changed from True to False" in error
