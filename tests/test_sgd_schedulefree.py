"""SGDScheduleFree is that of schedulefree 1.4.1, on every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from ppsf_dist import SGDScheduleFree, averaged
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint, step_in_backward
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.reference import close
from tests.rotation import rotated
from tests.runs import SINGLE, Run, difference, make_groups, open_loop, open_loop_without_start

NAME = "SGDScheduleFree"
STEPS = 8
SHAPES, ALL_SHAPES = named_shapes("small"), named_shapes("all")
SHARDED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"lr": 0.1},
    "decay": {"lr": 0.1, "weight_decay": 0.1},
    "warmup": {"lr": 0.1, "warmup_steps": 4},
    "powers": {"lr": 0.1, "momentum": 0.95, "r": 1.5, "weight_lr_power": 1.0},
}


def references(weights: dict[str, Tensor], variant: str) -> tuple[dict[str, nn.Parameter], Any]:
    parameters = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = schedulefree.SGDScheduleFree(make_groups(parameters, 2), **VARIANTS[variant])
    optimizer.train()
    return parameters, optimizer


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_and_each_evaluation_is_the_references(variant: str) -> None:
    start = initial_weights(ALL_SHAPES)
    ours = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = SGDScheduleFree(make_groups(ours, 2), **VARIANTS[variant])
    theirs, reference = references(start, variant)
    for step, gradients in enumerate(gradient_sequence(ALL_SHAPES, STEPS)):
        for parameters in (ours, theirs):
            set_grads(parameters, gradients)
        if step == 5:
            for group in (*optimizer.param_groups, *reference.param_groups):
                group["lr"] = 0.3
        optimizer.step()
        reference.step()
        if step in (2, STEPS - 1):
            for one in (optimizer, reference):
                one.eval()
            assert all(close(ours[name], theirs[name]) for name in ours)
            for one in (optimizer, reference):
                one.train()
        assert all(close(ours[name], theirs[name]) for name in ours)
    for group, expected in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for name in ("k", "weight_sum", "lr_max", "scheduled_lr"):
            assert group[name] == pytest.approx(expected[name], rel=1e-12), name


@functools.cache
def single(variant: str) -> Run:
    return open_loop(SINGLE, SHAPES, STEPS, groups=2, optimizer_class=NAME, **VARIANTS[variant])


@pytest.mark.dist
@pytest.mark.parametrize(("name", "variant"), rotated(SHARDED, VARIANTS))
def test_every_layout_gives_the_run_of_one_process(name: str, variant: str) -> None:
    layout = LAYOUTS[name]
    runs = run(
        layout.world_size, open_loop_without_start, layout, SHAPES, STEPS, groups=2, optimizer_class=NAME,
        **VARIANTS[variant],
    )  # fmt: skip
    for other in runs:
        assert other.groups == runs[0].groups == single(variant).groups
        assert difference(other, single(variant))["weights"] <= 1e-6
        # The one that tells of a bad gradient; replicas tell nobody.
        assert (other.collectives, other.asynchronous) == (0 if name == "replicated" else 1, 0)


def with_a_bad_gradient(name: str, skip: bool) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """One element of the last rank is not finite in step 3, or that step is left out."""
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[name])
    optimizer = SGDScheduleFree(make_groups(parameters, 2), lr=0.1)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 6)):
        if step == 3:
            if skip:
                continue
            gradients = {key: None if g is None else g.clone() for key, g in gradients.items()}
            wide = gradients["wide"]
            assert wide is not None
            wide.view(-1)[-1] = torch.inf
        set_grads(parameters, gradients)
        optimizer.step()
    numbers = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "skipped_steps")}
    return gather(parameters), optimizer.skipped_steps, numbers


@pytest.mark.dist
@pytest.mark.parametrize("name", ["single", "fsdp_2", "fsdp_4", "hsdp_2x2", "fsdp_tp_2x2"])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(name: str) -> None:
    ranks = LAYOUTS[name].world_size
    for (weights, skipped, numbers), (expected, _, others) in zip(
        run(ranks, with_a_bad_gradient, name, False), run(ranks, with_a_bad_gradient, name, True), strict=True
    ):
        assert skipped == 1 and numbers == others | {"scheduled_lr": numbers["scheduled_lr"]}
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


def half(name: str, folder: str, first: int, last: int) -> dict[str, Tensor]:
    """Some steps of a run, from the checkpoint there if it is not the first of them, with one left behind."""
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[name])
    model = nn.Module()
    model.weights = nn.ParameterDict(parameters)
    optimizer = SGDScheduleFree(make_groups(parameters, 2), lr=0.1, warmup_steps=6)
    if first:
        load_checkpoint(folder, model, optimizer)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if first <= step < last:
            set_grads(parameters, gradients)
            optimizer.step()
    save_checkpoint(folder, model, optimizer)
    with averaged(optimizer, model):
        return gather(parameters)


@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [("fsdp_3", "single"), ("single", "tp"), ("hsdp_2x2", "fsdp_tp_2x2")])
def test_a_run_goes_on_from_its_checkpoint_in_another_layout(before: str, after: str, tmp_path: Path) -> None:
    whole = run(1, half, "single", str(tmp_path / "whole"), 0, STEPS)[0]
    run(LAYOUTS[before].world_size, half, before, str(tmp_path / "run"), 0, 4)
    for weights in run(LAYOUTS[after].world_size, half, after, str(tmp_path / "run"), 4, STEPS):
        assert all(close(weights[key], value) for key, value in whole.items())


def test_the_references_state_dict_goes_on_here() -> None:
    start = initial_weights(SHAPES)
    theirs, reference = references(start, "powers")
    ours = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = SGDScheduleFree(make_groups(ours, 2), **VARIANTS["powers"])
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if step == 4:
            optimizer.load_state_dict(reference.state_dict())
            for name, parameter in ours.items():
                parameter.data.copy_(theirs[name])
        set_grads(theirs, gradients)
        reference.step()
        if step >= 4:
            set_grads(ours, gradients)
            optimizer.step()
    assert all(close(ours[name], theirs[name]) for name in ours)
    assert all("foreach" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1.0 is out of range: allowed is 0 <= beta < 1"),
        ({"warmup_steps": 2.5}, r"warmup_steps=2.5 is out of range: allowed is an integer >= 0"),
        ({"lr": -1.0}, r"lr=-1.0 is out of range"),
        ({"weight_decay": float("nan")}, r"weight_decay=nan is out of range"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDScheduleFree([nn.Parameter(torch.ones(2))], **arguments)


def test_an_argument_misspelt_in_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean warmup_steps"):
        SGDScheduleFree([{"params": [nn.Parameter(torch.ones(2))], "warmup_step": 3}])


def test_a_checkpoint_of_another_class_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="has no 'k': it was not made by SGDScheduleFree"):
        SGDScheduleFree([parameter]).load_state_dict(torch.optim.SGD([parameter], lr=0.1).state_dict())


def test_what_only_another_class_can_do_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"needs ProdigyPlusScheduleFree\(..., fused_back_pass=True\)"):
        step_in_backward(model, SGDScheduleFree(model.parameters()))  # type: ignore[arg-type]


def test_without_momentum_the_average_is_lost_and_eval_says_so() -> None:
    optimizer = SGDScheduleFree([nn.Parameter(torch.ones(2))], momentum=0.0)
    with pytest.raises(ValueError, match="momentum=0 in parameter group 0"):
        optimizer.eval()
