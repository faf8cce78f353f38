"""Open-loop runs: an optimizer on given gradients, on any layout, and how far two runs are apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import ppsf_dist
from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.harness.counting import count_collectives
from tests.harness.layouts import LAYOUTS, Layout, gather, set_grads, shard_parameters
from tests.harness.models import D0, NamedShapes, gradient_sequence, initial_weights

SINGLE = LAYOUTS["single"]


@dataclass
class Run:
    """What is left of a run: whole tensors and the numbers of each group after each step."""

    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    z: dict[str, Tensor]
    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    collectives: int = 0
    asynchronous: int = 0

    def numbers(self, name: str) -> list[list[float]]:
        return [[group[name] for group in groups if name in group] for groups in self.groups]


def make_groups(parameters: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Parameters dealt out to so many groups."""
    values = list(parameters.values())
    return [{"params": values[index::count]} for index in range(count)]


def make_optimizer(parameters: dict[str, Any], groups: int = 1, **switches: Any) -> ProdigyPlusScheduleFree:
    """The optimizer under test, silent about combinations that it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ProdigyPlusScheduleFree(make_groups(parameters, groups), **{"d0": D0, **switches})


def take_step(optimizer: Any, parameters: dict[str, Any], gradients: dict[str, Tensor | None]) -> None:
    """A step on given gradients. A closure form asks for them when it is at the training weights."""

    def closure() -> float:
        set_grads(parameters, gradients)
        return 0.0

    if "Closure" in type(optimizer).__name__:
        optimizer.step(closure)
    else:
        set_grads(parameters, gradients)
        optimizer.step()


def make_other(name: str, parameters: dict[str, Any], groups: int = 1, **arguments: Any) -> DistributedOptimizer:
    """An optimizer of another class of the package, silent about combinations that it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: DistributedOptimizer = getattr(ppsf_dist, name)(make_groups(parameters, groups), **arguments)
    return made


def open_loop(
    layout: Layout,
    shapes: NamedShapes,
    steps: int,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    missing: Any = None,
    noisy: int = 0,
    optimizer_class: str = "ProdigyPlusScheduleFree",
    **switches: Any,
) -> Run:
    """Run the optimizer on given gradients on a layout."""
    start = initial_weights(shapes, dtype=dtype)
    parameters = shard_parameters(start, layout)
    optimizer: DistributedOptimizer
    if optimizer_class == "ProdigyPlusScheduleFree":
        optimizer = make_optimizer(parameters, groups, **switches)
    else:
        optimizer = make_other(optimizer_class, parameters, groups, **switches)
    run = Run(start, {}, {})
    for step, gradients in enumerate(gradient_sequence(shapes, steps, dtype=dtype, missing=missing)):
        given = with_noise(gradients, step, noisy) if noisy else gradients
        if step < steps - 1:
            take_step(optimizer, parameters, given)
        else:
            # Only the last one: the first also compares parameters between ranks, and counting takes time.
            with count_collectives() as collectives:
                take_step(optimizer, parameters, given)
        assert optimizer.skipped_steps == 0  # Waits for the numbers, too.
        run.groups.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    run.collectives, run.asynchronous = collectives.blocking, collectives.asynchronous
    run.weights = gather(parameters)
    states = {name: optimizer.state[p] for name, p in parameters.items()}
    if all("z" in state for state in states.values()):
        run.z = gather(parameters, {name: state["z"] for name, state in states.items()})
    return run


def open_loop_without_start(*args: Any, **kwargs: Any) -> Run:
    """The same for a worker: what the parent can make itself does not travel."""
    run = open_loop(*args, **kwargs)
    run.start = {}
    return run


def largest(values: Any) -> float:
    return max((float(v) for v in values), default=0.0)


def difference(run: Run, reference: Run) -> dict[str, float]:
    """How far a run is from a reference that started from the same weights.

    ``d``: largest relative difference of d over all steps and groups. ``weights``: largest difference of an element
    beyond two rounding units of its parameter, relative to the largest movement of any element of that parameter.
    Early in a run weights move by few rounding units, so a relative bound alone would measure the dtype.
    """
    d = [
        abs(a - b) / b
        for ours, theirs in zip(run.numbers("d"), reference.numbers("d"), strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    weights = []
    for name, expected in reference.weights.items():
        rounding = 2 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        apart = float((run.weights[name].double() - expected.double()).abs().max())
        moved = float((expected.double() - reference.start[name].double()).abs().max())
        weights.append(max(0.0, apart - rounding) / moved if moved else apart)
    return {"d": largest(d), "weights": largest(weights)}


def check_same(run: Run, reference: Run) -> None:
    """A run differs from its reference by no more than sums in another order: numbers of the groups, and weights."""
    for ours, theirs in zip(run.groups, reference.groups, strict=True):
        for group, expected in zip(ours, theirs, strict=True):
            assert group.keys() == expected.keys()
            for name, value in expected.items():
                # Without a d nothing that is summed goes into the numbers.
                summed = "d" in expected and isinstance(value, float)
                assert group[name] == (pytest.approx(value, rel=1e-6) if summed else value), name
    assert difference(run, reference)["weights"] <= 1e-6


def with_noise(gradients: dict[str, Tensor | None], step: int, draw: int = 1) -> dict[str, Tensor | None]:
    """Gradients moved by one rounding unit: what a run does with them shows how well it is conditioned."""
    generator = torch.Generator().manual_seed(step + 1000 * (draw - 1))
    return {
        name: None
        if g is None
        else g * (1 + torch.finfo(g.dtype).eps / 2 * torch.randn(g.shape, generator=generator).to(g.dtype))
        for name, g in gradients.items()
    }


def twice(noise: dict[str, float], *, most: dict[str, float]) -> dict[str, float]:
    """What an unstable switch may make of another order of summation: twice what it makes of rounding noise.

    ``most`` bounds the noise itself, without which a switch that blew it up would allow any difference.
    """
    assert noise.keys() == most.keys() and all(noise[key] <= bound for key, bound in most.items()), (noise, most)
    return {key: 2 * value for key, value in noise.items()}
