"""Each sister is its reference, on every layout."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import averaged
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.family import EVERY_VARIANT, FAMILY, make, make_reference
from tests.harness.layouts import LAYOUTS, gather, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.reference import close
from tests.rotation import rotated
from tests.runs import (
    SINGLE,
    Run,
    check_same,
    open_loop,
    open_loop_without_start,
    take_step,
)

STEPS = 8
SHAPES, ALL_SHAPES = named_shapes("small"), named_shapes("single_process")
SHARDED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1]
EPS = torch.finfo(torch.float32).eps
MOST = {"d": 3e-6, "weights": 12.0}
"""How far rounding may take a run of the reference for it to be a yardstick: d relatively, weights in units."""


def parameters_of(weights: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in weights.items()}


def check_numbers(name: str, optimizer: Any, reference: Any) -> None:
    for ours, theirs in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for number in FAMILY[name].numbers:
            assert ours[number] == pytest.approx(theirs[number], rel=2e-6), number


@pytest.mark.parametrize(("name", "variant"), EVERY_VARIANT)
def test_each_step_and_each_evaluation_is_the_references(name: str, variant: str) -> None:
    """From the reference's own state each time, so that nothing adds up: its state dict goes on here, too."""
    start = initial_weights(ALL_SHAPES)
    ours, theirs = parameters_of(start), parameters_of(start)
    optimizer, reference = make(name, variant, ours), make_reference(name, variant, theirs)
    for step, gradients in enumerate(gradient_sequence(ALL_SHAPES, STEPS)):
        if step:
            for key, parameter in ours.items():
                parameter.data.copy_(theirs[key])
            optimizer.load_state_dict(reference.state_dict())
        if step == 5:
            for group in (*optimizer.param_groups, *reference.param_groups):
                group["lr"] *= 3
        take_step(optimizer, ours, gradients)
        take_step(reference, theirs, gradients)
        assert optimizer.skipped_steps == 0
        check_numbers(name, optimizer, reference)
        assert {key for key in ours if not close(ours[key], theirs[key])} == set()
        if FAMILY[name].evaluates and step in (2, STEPS - 1):
            for one in (optimizer, reference):
                one.eval()
            assert {key for key in ours if not close(ours[key], theirs[key])} == set()
            for one in (optimizer, reference):
                one.train()


def run_of_the_reference(name: str, variant: str, dtype: torch.dtype = torch.float32, noise: int | None = None) -> Run:
    """Its run in a dtype; with the seed of a noise on gradients that moves each by a rounding unit of fp32 or not."""
    generator = torch.Generator().manual_seed(noise or 0)

    def given(gradient: Tensor) -> Tensor:
        if noise is not None:
            gradient = gradient * (1 + EPS * torch.randint(-1, 2, gradient.shape, generator=generator))
        return gradient.to(dtype)

    start = {key: value.to(dtype) for key, value in initial_weights(ALL_SHAPES).items()}
    parameters = parameters_of(start)
    reference = make_reference(name, variant, parameters)
    groups = []
    for gradients in gradient_sequence(ALL_SHAPES, STEPS):
        take_step(reference, parameters, {key: None if g is None else given(g) for key, g in gradients.items()})
        groups.append([{k: v for k, v in group.items() if k != "params"} for group in reference.param_groups])
    return Run(start, {key: parameter.detach() for key, parameter in parameters.items()}, {}, groups)


def error_of(run_: Run, exact: Run) -> dict[str, float]:
    """How far a run is from the one in fp64: d relatively, weights in rounding units of each parameter's largest."""
    units = [
        float((run_.weights[key].double() - weights).abs().max() / weights.abs().max().clamp_min(1e-30)) / EPS
        for key, weights in exact.weights.items()
    ]
    pairs = zip(run_.numbers("d"), exact.numbers("d"), strict=True)
    d = [abs(ours / theirs - 1) for of_step in pairs for ours, theirs in zip(*of_step, strict=True)]
    return {"weights": max(units), "d": max(d, default=0.0)}


@pytest.mark.parametrize(("name", "variant"), EVERY_VARIANT)
def test_a_run_is_the_references(name: str, variant: str) -> None:
    """It is no more than twice as far from the reference's run in fp64 as that in fp32 is, or one rounding unit.

    Where rounding is amplified, how far that is is itself a matter of rounding: the largest of five counts.
    """
    exact = run_of_the_reference(name, variant, torch.float64)
    spread = [error_of(run_of_the_reference(name, variant, noise=noise), exact) for noise in (None, 0, 1, 2, 4)]
    reference = {key: max(error[key] for error in spread) for key in spread[0]}
    assert reference["weights"] <= MOST["weights"] and reference["d"] <= MOST["d"]
    arguments = FAMILY[name].variants[variant]
    ours = error_of(open_loop(SINGLE, ALL_SHAPES, STEPS, groups=2, optimizer_class=name, **arguments), exact)
    assert ours["weights"] <= 2 * max(reference["weights"], 1) and ours["d"] <= 2 * max(reference["d"], EPS)


@functools.cache
def single(name: str, variant: str) -> Run:
    return open_loop(SINGLE, SHAPES, STEPS, groups=2, optimizer_class=name, **FAMILY[name].variants[variant])


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "which"), rotated(SHARDED, EVERY_VARIANT, rounds=1))
def test_every_layout_gives_the_run_of_one_process(layout: str, which: tuple[str, str]) -> None:
    name, variant = which
    runs = run(
        LAYOUTS[layout].world_size, open_loop_without_start, LAYOUTS[layout], SHAPES, STEPS, groups=2,
        optimizer_class=name, **FAMILY[name].variants[variant],
    )  # fmt: skip
    for other in runs:
        assert other.groups == runs[0].groups
        check_same(other, single(name, variant))
        # Replicas tell nobody.
        expected = 0 if layout == "replicated" else FAMILY[name].collectives
        assert (other.collectives, other.asynchronous) == (expected, 0)


def with_a_bad_gradient(name: str, layout: str, skip: bool) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """One element of the last rank is not finite in step 3, or that step is left out."""
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout])
    optimizer = make(name, "default", parameters)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 6)):
        if step == 3:
            if skip:
                continue
            gradients = {key: None if g is None else g.clone() for key, g in gradients.items()}
            wide = gradients["wide"]
            assert wide is not None
            wide.view(-1)[-1] = torch.inf
        take_step(optimizer, parameters, gradients)
    skipped = optimizer.skipped_steps
    return gather(parameters), skipped, {number: optimizer.param_groups[0][number] for number in FAMILY[name].numbers}


@pytest.mark.dist
@pytest.mark.parametrize(("name", "layout"), rotated(FAMILY, ["single", "fsdp_2", "fsdp_4", "hsdp_2x2", "fsdp_tp_2x2"]))
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(name: str, layout: str) -> None:
    ranks = LAYOUTS[layout].world_size
    for (weights, skipped, numbers), (expected, _, others) in zip(
        run(ranks, with_a_bad_gradient, name, layout, False),
        run(ranks, with_a_bad_gradient, name, layout, True),
        strict=True,
    ):
        assert skipped == 1 and numbers == others
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


def half(name: str, layout: str, folder: str, first: int, last: int) -> dict[str, Tensor]:
    """Some steps of a run, from the checkpoint there if it is not the first of them, with one left behind."""
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout])
    model = nn.Module()
    model.weights = nn.ParameterDict(parameters)
    optimizer = make(name, list(FAMILY[name].variants)[-1], parameters)
    if first:
        load_checkpoint(folder, model, optimizer)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if first <= step < last:
            take_step(optimizer, parameters, gradients)
    save_checkpoint(folder, model, optimizer)
    if not FAMILY[name].evaluates:
        return gather(parameters)
    with averaged(optimizer, model):
        return gather(parameters)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "layouts"),
    rotated(FAMILY, [("fsdp_3", "single"), ("single", "tp"), ("hsdp_2x2", "fsdp_tp_2x2")], rounds=1),
)
def test_a_run_goes_on_from_its_checkpoint_in_another_layout(
    name: str, layouts: tuple[str, str], tmp_path: Path
) -> None:
    before, after = layouts
    whole = run(1, half, name, "single", str(tmp_path / "whole"), 0, STEPS)[0]
    run(LAYOUTS[before].world_size, half, name, before, str(tmp_path / "run"), 0, 4)
    for weights in run(LAYOUTS[after].world_size, half, name, after, str(tmp_path / "run"), 4, STEPS):
        assert all(close(weights[key], value) for key, value in whole.items())


def goes_on(name: str, layout: str, state_dict: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second half of a run, from a state dict."""
    parameters = shard_parameters(weights, LAYOUTS[layout])
    optimizer = make(name, "default", parameters)
    optimizer.load_state_dict(state_dict)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if step >= STEPS // 2:
            take_step(optimizer, parameters, gradients)
    assert optimizer.skipped_steps == 0
    return gather(parameters)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "layout"), rotated(FAMILY, ["fsdp_2", "fsdp_tp_2x2", "hsdp_2x2", "single"], rounds=1))
def test_a_run_of_the_reference_goes_on_here_sharded_or_not(name: str, layout: str) -> None:
    theirs = parameters_of(initial_weights(SHAPES))
    reference = make_reference(name, "default", theirs)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if step == STEPS // 2:
            state_dict = copy.deepcopy(reference.state_dict())
            weights = {key: parameter.detach().clone() for key, parameter in theirs.items()}
        take_step(reference, theirs, gradients)
    for ours in run(LAYOUTS[layout].world_size, goes_on, name, layout, state_dict, weights):
        assert {key for key, value in theirs.items() if not close(ours[key], value.detach())} == set()


@pytest.mark.parametrize("name", FAMILY)
def test_a_checkpoint_of_another_class_is_refused(name: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make(name, "default", {"weight": parameter}, groups=1)
    with pytest.raises(ValueError, match=f"has no 'k': it was not made by {name}"):
        optimizer.load_state_dict(torch.optim.SGD([parameter], lr=0.1).state_dict())
