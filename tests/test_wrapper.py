"""ScheduleFreeWrapper: that it is schedulefree's around any base optimizer, on every layout."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

from ppsf_dist import Prodigy, ScheduleFreeWrapper, averaged
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.harness.counting import count_collectives
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.reference import close
from tests.rotation import rotated
from tests.runs import make_groups

STEPS = 8
SHAPES = named_shapes("small")
Groups = list[dict[str, Any]]
Base = Callable[[Groups], Optimizer]

BASES: dict[str, tuple[Base, Base, dict[str, Any]]] = {
    "sgd": (lambda g: SGD(g, lr=0.1), lambda g: SGD(g, lr=0.1), {"momentum": 0.95, "r": 1.0}),
    "adamw": (
        lambda g: AdamW(g, lr=0.01, betas=(0.0, 0.99)),
        lambda g: AdamW(g, lr=0.01, betas=(0.0, 0.99)),
        {"weight_decay_at_y": 0.1, "weight_lr_power": 1.0},
    ),
    "rmsprop": (lambda g: RMSprop(g, lr=0.01), lambda g: RMSprop(g, lr=0.01), {}),
    "adagrad": (lambda g: Adagrad(g, lr=0.1), lambda g: Adagrad(g, lr=0.1), {"weight_decay_at_y": 0.1}),
    "prodigy": (
        lambda g: Prodigy(g, d0=1e-3, betas=(0.5, 0.99)),
        lambda g: prodigyopt.Prodigy(g, d0=1e-3, betas=(0.5, 0.99)),
        {},
    ),
}
"""Our base, the one in schedulefree's wrapper, and arguments of both wrappers."""
KEY_ERRORS = ("adamw", "rmsprop")
"""schedulefree's wrapper puts z into the state before the base has made its own, which these take for theirs."""


def parameters_of(weights: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in weights.items()}


def make(base: str, parameters: dict[str, Any], groups: int = 2) -> ScheduleFreeWrapper:
    ours, _, arguments = BASES[base]
    return ScheduleFreeWrapper(ours(make_groups(parameters, groups)), **arguments)


def make_reference(base: str, parameters: dict[str, Any], groups: int = 2) -> Any:
    _, theirs, arguments = BASES[base]
    with contextlib.redirect_stdout(io.StringIO()):
        made = schedulefree.ScheduleFreeWrapperReference(theirs(make_groups(parameters, groups)), **arguments)
    made.train()
    return made


def test_arguments_their_order_and_their_defaults_are_the_references() -> None:
    both = (ScheduleFreeWrapper, schedulefree.ScheduleFreeWrapper)
    ours, theirs = (list(inspect.signature(cls).parameters.values()) for cls in both)
    named = [(p.name, p.default) for p in ours if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert named == [(p.name, p.default) for p in theirs]


class Explicit:
    """The formulas with a tensor for each of x, y and z, around a base optimizer that steps z itself."""

    def __init__(self, base: str, parameters: dict[str, nn.Parameter]) -> None:
        self.y = parameters
        self.x, self.z = ({name: p.detach().clone() for name, p in parameters.items()} for _ in range(2))
        self.base = BASES[base][1](make_groups(self.z, 2))
        self.arguments = {"momentum": 0.9, "weight_decay_at_y": 0.0, "weight_lr_power": 2, "r": 0} | BASES[base][2]
        self.param_groups = self.base.param_groups
        for group in self.param_groups:
            group |= {"k": 0, "weight_sum": 0.0, "lr_max": 0.0}

    @torch.no_grad()
    def step(self) -> None:
        decay = self.arguments["weight_decay_at_y"]
        r, power = self.arguments["r"], self.arguments["weight_lr_power"]
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for name, z in self.z.items():
            z.grad = self.y[name].grad
            z -= group_of[z]["lr"] * decay * self.y[name]
        self.base.step()
        for group in self.param_groups:
            group["lr_max"] = max(group["lr"], group["lr_max"])
            group["weight"] = (group["k"] + 1) ** r * group["lr_max"] ** power
            group["weight_sum"] += group["weight"]
            group["k"] += 1
        for name, z in self.z.items():
            c = group_of[z]["weight"] / group_of[z]["weight_sum"]
            self.x[name].lerp_(z, c)
        self.train()

    @torch.no_grad()
    def eval(self) -> None:
        for name, p in self.y.items():
            p.copy_(self.x[name])

    @torch.no_grad()
    def train(self) -> None:
        for name, p in self.y.items():
            p.copy_(self.x[name].lerp(self.z[name], 1 - self.arguments["momentum"]))


@pytest.mark.parametrize("base", KEY_ERRORS)
def test_the_reference_cannot_wrap_every_optimizer(base: str) -> None:
    """Where it can, the formulas of ``Explicit`` are not needed."""
    parameters = parameters_of(initial_weights(SHAPES))
    reference = make_reference(base, parameters)
    set_grads(parameters, next(iter(gradient_sequence(SHAPES, 1))))
    with pytest.raises(KeyError):
        reference.step()


@pytest.mark.parametrize("base", BASES)
def test_a_run_and_its_evaluations_are_the_references(base: str) -> None:
    """With Explicit where schedulefree cannot; its form of three tensors, as the other cannot take 0-dim parameters."""
    start = initial_weights(SHAPES)
    ours, theirs = parameters_of(start), parameters_of(start)
    optimizer = make(base, ours)
    reference: Any = Explicit(base, theirs) if base in KEY_ERRORS else make_reference(base, theirs)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        for parameters, one in ((ours, optimizer), (theirs, reference)):
            set_grads(parameters, gradients)
            if step == 5:
                for group in one.param_groups:
                    group["lr"] *= 3
            one.step()
        assert {key for key in ours if not close(ours[key], theirs[key])} == set()
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            for name in ("weight_sum", "lr_max"):
                assert group[f"wrapper_{name}"] == pytest.approx(other[name], rel=3e-6)
            assert group["wrapper_k"] == step + 1
        if step in (2, STEPS - 1):
            for one in (optimizer, reference):
                one.eval()
            assert {key for key in ours if not close(ours[key], theirs[key])} == set()
            for one in (optimizer, reference):
                one.train()


@functools.cache
def single(base: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]], int]:
    return on_layout("single", base)


def on_layout(layout: str, base: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]], int]:
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout])
    optimizer = make(base, parameters)
    for step, gradients in enumerate(
        gradient_sequence(SHAPES, STEPS, missing=lambda k, name: (k, name) == (3, "wide"))
    ):
        if step == 5:
            gradients = {key: None if g is None else g.clone() for key, g in gradients.items()}
            wide = gradients["wide"]
            assert wide is not None
            wide.view(-1)[-1] = torch.nan
        set_grads(parameters, gradients)
        with count_collectives() as collectives:
            optimizer.step()
    assert optimizer.skipped_steps == 1
    groups = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
    weights = gather(parameters)
    with averaged(optimizer):
        return weights, gather(parameters), groups, collectives.total


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "base"), rotated([name for name in LAYOUTS if name != "single"], BASES, rounds=2))
def test_every_layout_gives_the_run_of_one_process(layout: str, base: str) -> None:
    """With a missing gradient, and one that is not finite on one rank only."""
    expected = single(base)
    for weights, average, groups, collectives in run(LAYOUTS[layout].world_size, on_layout, layout, base):
        assert all(close(weights[key], value) for key, value in expected[0].items())
        assert all(close(average[key], value) for key, value in expected[1].items())
        for group, other in zip(groups, expected[2], strict=True):
            assert {k: v for k, v in group.items() if k.startswith("wrapper")} == pytest.approx(
                {k: v for k, v in other.items() if k.startswith("wrapper")}, rel=3e-6
            )
        # Prodigy has one of its own.
        alone = layout == "replicated" or LAYOUTS[layout].world_size == 1
        assert collectives == (0 if alone else 1 + (base == "prodigy"))


def half(base: str, layout: str, folder: str, first: int, last: int) -> dict[str, Tensor]:
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS[layout])
    model = nn.Module()
    model.weights = nn.ParameterDict(parameters)
    optimizer = make(base, parameters)
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
@pytest.mark.parametrize(
    ("base", "layouts"), rotated(BASES, [("fsdp_2", "single"), ("single", "tp"), ("hsdp_2x2", "fsdp_tp_2x2")], rounds=1)
)
def test_a_run_goes_on_from_its_checkpoint_in_another_layout(
    base: str, layouts: tuple[str, str], tmp_path: Path
) -> None:
    before, after = layouts
    whole = run(1, half, base, "single", str(tmp_path / "whole"), 0, STEPS)[0]
    run(LAYOUTS[before].world_size, half, base, before, str(tmp_path / "run"), 0, 4)
    for weights in run(LAYOUTS[after].world_size, half, base, after, str(tmp_path / "run"), 4, STEPS):
        assert all(close(weights[key], value) for key, value in whole.items())


def goes_on_from(state_dict: dict[str, Any], weights: dict[str, Tensor], base: str, layout: str) -> dict[str, Tensor]:
    parameters = shard_parameters(weights, LAYOUTS[layout])
    optimizer = make(base, parameters)
    optimizer.load_state_dict(state_dict)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if step >= 4:
            set_grads(parameters, gradients)
            optimizer.step()
    return gather(parameters)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("base", "layout"), rotated(sorted(set(BASES) - set(KEY_ERRORS)), ["fsdp_2", "single", "fsdp_tp_2x2"], rounds=1)
)
def test_a_run_of_the_reference_goes_on_here(base: str, layout: str) -> None:
    parameters = parameters_of(initial_weights(SHAPES))
    reference = make_reference(base, parameters)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if step == 4:
            state_dict = copy.deepcopy(reference.state_dict())
            weights = {name: p.detach().clone() for name, p in parameters.items()}
        set_grads(parameters, gradients)
        reference.step()
    for ours in run(LAYOUTS[layout].world_size, goes_on_from, state_dict, weights, base, layout):
        assert {key for key, value in parameters.items() if not close(ours[key], value.detach())} == set()
