"""Each sister is its reference, on every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import averaged
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.family import EVERY_VARIANT, FAMILY, make, make_reference
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.reference import close
from tests.rotation import rotated
from tests.runs import SINGLE, Run, check_same, difference, open_loop, open_loop_without_start, twice, with_noise

STEPS = 8
SHAPES, ALL_SHAPES = named_shapes("small"), named_shapes("single_process")
SHARDED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1]
MOST = {"d": 1e-6, "weights": 1e-5}
"""What rounding noise of the gradients may make of a run, for the noise to be a yardstick."""


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
        for parameters in (ours, theirs):
            set_grads(parameters, gradients)
        if step == 5:
            for group in (*optimizer.param_groups, *reference.param_groups):
                group["lr"] *= 3
        optimizer.step()
        reference.step()
        assert optimizer.skipped_steps == 0
        check_numbers(name, optimizer, reference)
        assert {key for key in ours if not close(ours[key], theirs[key])} == set()
        if FAMILY[name].evaluates and step in (2, STEPS - 1):
            for one in (optimizer, reference):
                one.eval()
            assert {key for key in ours if not close(ours[key], theirs[key])} == set()
            for one in (optimizer, reference):
                one.train()


def run_of_the_reference(name: str, variant: str, *, noisy: bool = False) -> Run:
    start = initial_weights(ALL_SHAPES)
    parameters = parameters_of(start)
    reference = make_reference(name, variant, parameters)
    groups = []
    for step, gradients in enumerate(gradient_sequence(ALL_SHAPES, STEPS)):
        set_grads(parameters, with_noise(gradients, step) if noisy else gradients)
        reference.step()
        groups.append([{k: v for k, v in group.items() if k != "params"} for group in reference.param_groups])
    return Run(start, {key: parameter.detach() for key, parameter in parameters.items()}, {}, groups)


@pytest.mark.parametrize(("name", "variant"), EVERY_VARIANT)
def test_a_run_is_the_references(name: str, variant: str) -> None:
    reference = run_of_the_reference(name, variant)
    allowed = twice(difference(run_of_the_reference(name, variant, noisy=True), reference), most=MOST)
    arguments = FAMILY[name].variants[variant]
    apart = difference(open_loop(SINGLE, ALL_SHAPES, STEPS, groups=2, optimizer_class=name, **arguments), reference)
    assert apart["d"] <= max(allowed["d"], 1e-6) and apart["weights"] <= max(allowed["weights"], 1e-6)


@functools.cache
def single(name: str, variant: str) -> Run:
    return open_loop(SINGLE, SHAPES, STEPS, groups=2, optimizer_class=name, **FAMILY[name].variants[variant])


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "which"), rotated(SHARDED, EVERY_VARIANT))
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
        set_grads(parameters, gradients)
        optimizer.step()
    skipped = optimizer.skipped_steps
    return gather(parameters), skipped, {number: optimizer.param_groups[0][number] for number in FAMILY[name].numbers}


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["single", "fsdp_2", "fsdp_4", "hsdp_2x2", "fsdp_tp_2x2"])
@pytest.mark.parametrize("name", FAMILY)
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
            set_grads(parameters, gradients)
            optimizer.step()
    save_checkpoint(folder, model, optimizer)
    if not FAMILY[name].evaluates:
        return gather(parameters)
    with averaged(optimizer, model):
        return gather(parameters)


@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [("fsdp_3", "single"), ("single", "tp"), ("hsdp_2x2", "fsdp_tp_2x2")])
@pytest.mark.parametrize("name", FAMILY)
def test_a_run_goes_on_from_its_checkpoint_in_another_layout(
    name: str, before: str, after: str, tmp_path: Path
) -> None:
    whole = run(1, half, name, "single", str(tmp_path / "whole"), 0, STEPS)[0]
    run(LAYOUTS[before].world_size, half, name, before, str(tmp_path / "run"), 0, 4)
    for weights in run(LAYOUTS[after].world_size, half, name, after, str(tmp_path / "run"), 4, STEPS):
        assert all(close(weights[key], value) for key, value in whole.items())


@pytest.mark.parametrize("name", FAMILY)
def test_a_checkpoint_of_another_class_is_refused(name: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make(name, "default", {"weight": parameter}, groups=1)
    with pytest.raises(ValueError, match=f"has no 'k': it was not made by {name}"):
        optimizer.load_state_dict(torch.optim.SGD([parameter], lr=0.1).state_dict())
