"""What observers are told of a step: the truth, of each step once and in order, without a wait."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppsf_dist import ProdigyPlusScheduleFree, StepReport
from ppsf_dist.fsdp import step_in_backward
from ppsf_dist.methods.base import Cause
from tests.family import FAMILY
from tests.harness.counting import count_collectives, count_host_syncs
from tests.harness.kernels import kernels
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.rotation import rotated
from tests.runs import SINGLE, make_groups, make_optimizer, make_other, take_step
from tests.switches import EVERY
from tests.test_soundness import Late

SHAPES = named_shapes("small")
STEPS = 6
SHARDED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1]
CLASSES: dict[str, dict[str, Any]] = {
    "ProdigyPlusScheduleFree": {"d0": D0},
    **{name: member.variants["default"] for name, member in FAMILY.items()},
}


def of_group(tensors: dict[str, Any], index: int) -> list[Tensor]:
    return [tensor for tensor in list(tensors.values())[index::2] if tensor is not None]


def length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("name", CLASSES)
def test_a_report_holds_the_numbers_of_its_step(name: str) -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_other(name, parameters, 2, **CLASSES[name])
    reports: list[StepReport] = []
    optimizer.observe(reports.append)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS), start=1):
        take_step(optimizer, parameters, gradients)
        assert len(reports) == step
        report = reports[-1]
        assert (report.steps, report.skipped, report.cause) == (step, 0, None)
        for index, (group, told) in enumerate(zip(optimizer.param_groups, report.groups, strict=True)):
            for number in set(optimizer.method.numbers) - {"k", "skipped_steps"}:
                assert told[number] == group[number]
            assert told["gradient_norm"] == pytest.approx(length(of_group(gradients, index)), rel=1e-6)


@pytest.mark.parametrize("switches", ["momentum", "orthograd", "default"])
def test_the_norm_of_the_update_is_the_length_of_the_move(switches: str) -> None:
    """Of the weights without Schedule-Free, and of z with it, which moves by the whole step."""
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_optimizer(parameters, 2, d_coef=2.0, **EVERY[switches])
    reports: list[StepReport] = []
    optimizer.observe(reports.append)
    averages = optimizer.param_groups[0]["use_schedulefree"]
    before: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for gradients in gradient_sequence(SHAPES, STEPS):
        take_step(optimizer, parameters, gradients)
        after = {n: (optimizer.state[p]["z"] if averages else p).detach().clone() for n, p in parameters.items()}
        moves = {name: after[name].double() - before[name].double() for name in parameters}
        before = after
        for index, told in enumerate(reports[-1].groups):
            moved = length(of_group(moves, index))
            # OrthoGrad takes away what lies along the weights, after the norm has been taken.
            assert moved <= told["update_norm"] * (1 + 1e-4)  # type: ignore[operator]
            assert switches == "orthograd" or moved == pytest.approx(told["update_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["SGDScheduleFree", "Prodigy"])
def test_a_norm_that_nothing_measures_is_none(name: str) -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_other(name, parameters, 2, **CLASSES[name])
    reports: list[StepReport] = []
    optimizer.observe(reports.append)
    for gradients in gradient_sequence(SHAPES, 2):
        take_step(optimizer, parameters, gradients)
    assert [group["update_norm"] for report in reports for group in report.groups] == [None] * 4


def observed(layout: str, name: str, watching: list[int]) -> tuple[list[StepReport], dict[str, Tensor], int]:
    """The reports of a run that some ranks watch, with a gradient in it that is not finite on the last rank."""
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout])
    optimizer = make_other(name, parameters, 2, **CLASSES[name])
    reports: list[StepReport] = []
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank in watching:
        optimizer.observe(reports.append)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if step == 3:
            gradients = {key: None if g is None else g.clone() for key, g in gradients.items()}
            wide = gradients["wide"]
            assert wide is not None
            wide.view(-1)[-1] = torch.inf
        with count_collectives() as collectives:
            take_step(optimizer, parameters, gradients)
    return reports, gather(parameters), collectives.total


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "name"), rotated(SHARDED, CLASSES, rounds=1))
def test_every_rank_of_every_layout_is_told_the_same(layout: str, name: str) -> None:
    expected, _, _ = observed("single", name, [0])
    ranks = LAYOUTS[layout].world_size
    for reports, _, _ in run(ranks, observed, layout, name, list(range(ranks))):
        assert [(r.steps, r.skipped, r.cause) for r in reports] == [(r.steps, r.skipped, r.cause) for r in expected]
        for ours, theirs in zip(reports, expected, strict=True):
            for told, alone in zip(ours.groups, theirs.groups, strict=True):
                assert told.keys() == alone.keys()
                for number, value in alone.items():
                    assert told[number] == (None if value is None else pytest.approx(value, rel=1e-5)), number


@pytest.mark.dist
def test_one_rank_may_watch_alone() -> None:
    none = run(2, observed, "fsdp_2", "ProdigyPlusScheduleFree", [])
    (reports, weights, collectives), (others, _, of_other) = run(2, observed, "fsdp_2", "ProdigyPlusScheduleFree", [1])
    assert reports == [] and len(others) == STEPS
    assert collectives == of_other == none[0][2]
    assert all(torch.equal(weights[name], value) for name, value in none[0][1].items())


def test_a_step_that_changes_nothing_says_why() -> None:
    reports, _, _ = observed("single", "ProdigyPlusScheduleFree", [0])
    assert [(r.steps, r.skipped, r.cause) for r in reports][2:5] == [(3, 0, None), (3, 1, Cause.GRADIENT), (4, 1, None)]
    first, second = reports[3].groups
    assert first["gradient_norm"] == math.inf and first["update_norm"] is None and second["update_norm"] is None
    assert {name: first[name] for name in ("d", "d_numerator")} == {
        name: reports[2].groups[0][name] for name in ("d", "d_numerator")
    }


def steps_of(optimizer: Any, parameters: dict[str, Any], first: int, last: int) -> None:
    for step, gradients in enumerate(gradient_sequence(SHAPES, last)):
        if step >= first:
            set_grads(parameters, gradients)
            optimizer.step()


@pytest.mark.parametrize("seed", range(4))
def test_copies_that_arrive_late_are_told_in_order_and_each_once(seed: int) -> None:
    prompt: list[StepReport] = []
    late: list[StepReport] = []
    for told, host in ((prompt, None), (late, Late(seed))):
        parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
        # Of a host that reads at once C++ would compute the numbers, to another last bit.
        with kernels("eager"):
            optimizer = make_optimizer(parameters, 2)
        optimizer.observe(told.append)
        if host is not None:
            optimizer._engine.host = host
        steps_of(optimizer, parameters, 0, 12)
        seen = len(told)
        optimizer.get_d()
        assert len(told) == 12
        assert host is None or seen < 12
    assert prompt == late


def test_watching_costs_no_wait() -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_optimizer(parameters, 2)
    optimizer.observe(lambda report: None)
    steps_of(optimizer, parameters, 0, 2)
    (plan,) = optimizer._engine.plans.values()
    plan.host.free = False
    steps_of(optimizer, parameters, 2, 4)
    set_grads(parameters, list(gradient_sequence(SHAPES, 5))[-1])
    with count_host_syncs() as syncs:
        optimizer.step()
    assert dict(syncs.names) == {"numpy": 1}


def test_an_exception_of_an_observer_comes_after_the_step() -> None:
    def broken(report: StepReport) -> None:
        if report.steps == 2:
            raise KeyError("disk full")

    runs = []
    for observer in (None, broken):
        parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
        optimizer = make_optimizer(parameters, 2)
        after: list[StepReport] = []
        if observer is not None:
            optimizer.observe(observer)
            optimizer.observe(after.append)
        raised = 0
        for gradients in gradient_sequence(SHAPES, 4):
            set_grads(parameters, gradients)
            try:
                optimizer.step()
            except KeyError:
                raised += 1
        assert raised == (observer is not None)
        # The others are told of the next one again.
        assert [report.steps for report in after] == ([] if observer is None else [1, 3, 4])
        runs.append(({name: p.detach().clone() for name, p in parameters.items()}, optimizer.get_d()))
    (weights, d), (others, of_others) = runs
    assert d == of_others and all(torch.equal(weights[name], value) for name, value in others.items())


def test_an_observer_can_be_taken_away() -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_optimizer(parameters, 2)
    reports: list[StepReport] = []
    handle = optimizer.observe(reports.append)
    steps_of(optimizer, parameters, 0, 2)
    handle.remove()
    steps_of(optimizer, parameters, 2, 4)
    assert [report.steps for report in reports] == [1, 2]


def test_after_a_checkpoint_its_steps_are_counted_on() -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_optimizer(parameters, 2)
    reports: list[StepReport] = []
    optimizer.observe(reports.append)
    steps_of(optimizer, parameters, 0, 2)
    saved = optimizer.state_dict()
    steps_of(optimizer, parameters, 2, 4)
    optimizer.load_state_dict(saved)
    steps_of(optimizer, parameters, 2, 3)
    assert [report.steps for report in reports] == [1, 2, 3, 4, 3]
    assert reports[2] == reports[4]


def test_a_backward_pass_is_one_step() -> None:
    model = torch.nn.Linear(8, 4)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    reports: list[StepReport] = []
    optimizer.observe(reports.append)
    step_in_backward(model, optimizer)
    for _ in range(3):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    assert [report.steps for report in reports] == [1, 2, 3]
    (group,) = reports[-1].groups
    assert group["gradient_norm"] is not None and group["gradient_norm"] > 0


def test_groups_are_made_in_the_order_of_param_groups() -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    reports: list[StepReport] = []
    optimizer = ProdigyPlusScheduleFree(make_groups(parameters, 2), d0=D0)
    optimizer.param_groups[1]["d"] = 0.5
    optimizer.observe(reports.append)
    steps_of(optimizer, parameters, 0, 1)
    first, second = reports[0].groups
    assert first["d"] is not None and second["d"] is not None and first["d"] < 0.1 < second["d"]
