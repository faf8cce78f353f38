"""What a step may cost: collectives, and waits of the host for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.family import FAMILY, make
from tests.harness.counting import count_collectives, count_host_syncs
from tests.harness.layouts import LAYOUTS, set_grads, shard_parameters
from tests.harness.models import NamedShapes, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.rotation import rotated
from tests.runs import SINGLE, make_optimizer, open_loop_without_start, take_step
from tests.switches import EVERY, Switch

REDUCTIONS = {
    "default": 2,
    "speed": 2,
    "momentum": 2,
    "grams": 2,
    "weight_decay": 2,
    "bias_correction": 2,
    "mean_d": 2,
    "prodigy_steps": 2,
    "orthograd": 2,
    "cautious": 3,
    "momentum_cautious": 2,
    "no_stableadamw": 1,
    "atan2": 1,
    "unfactored": 1,
    "focus": 1,
    "adopt": 1,
    "unfactored_orthograd": 1,
    "cautious_no_stableadamw": 2,
    "unfactored_cautious": 2,
    "unfactored_no_stableadamw": 1,
    "adopt_no_stableadamw": 1,
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "switch"), rotated(["fsdp_2", "hsdp_2x2", "fsdp_tp_2x2", "mixed"], REDUCTIONS, rounds=1)
)
def test_reductions_of_a_step(layout: str, switch: str) -> None:
    runs = run(LAYOUTS[layout].world_size, open_loop_without_start, LAYOUTS[layout], named_shapes("small"), 3,
               **EVERY[switch])  # fmt: skip
    assert {(r.collectives, r.asynchronous) for r in runs} == {(REDUCTIONS[switch], 0)}


@pytest.mark.dist
@pytest.mark.parametrize("count", [1, 100])
def test_their_number_does_not_grow_with_the_parameters(count: int) -> None:
    shapes: NamedShapes = [(f"w{i}", (33, 40)) for i in range(count)]
    runs = run(2, open_loop_without_start, LAYOUTS["fsdp_2"], shapes, 3)
    assert {r.collectives for r in runs} == {2}


@pytest.mark.dist
def test_replicas_need_no_collective() -> None:
    runs = run(2, open_loop_without_start, LAYOUTS["replicated"], named_shapes("small"), 3)
    assert {r.collectives for r in runs} == {0}


def host_syncs(switch: Switch, *, accelerator: bool) -> dict[str, int]:
    shapes = named_shapes("single_process")
    parameters = shard_parameters(initial_weights(shapes), SINGLE)
    optimizer = make_optimizer(parameters, 3, **switch)
    *before, last = gradient_sequence(shapes, 4)
    for step, gradients in enumerate(before):
        set_grads(parameters, gradients)
        if step == 1 and accelerator:
            (plan,) = optimizer._engine.plans.values()
            plan.host.free = False
        optimizer.step()
    set_grads(parameters, last)
    with count_host_syncs() as syncs, count_collectives() as collectives:
        optimizer.step()
    assert collectives.total == 0
    return dict(syncs.names)


@pytest.mark.parametrize("switch", EVERY)
def test_a_step_never_waits_for_the_device(switch: str) -> None:
    """The one read is of numbers that an earlier step sent to the host's memory and that have arrived there."""
    assert host_syncs(EVERY[switch], accelerator=True) == {"numpy": 1}


def test_on_a_cpu_the_step_reads_its_numbers_where_they_are() -> None:
    """The verdict, the gates (which parameters are written) and the numbers for loggers: nothing to wait for."""
    assert host_syncs({}, accelerator=False) == {"tolist": 3}


def addresses(optimizer: DistributedOptimizer) -> dict[str, int]:
    """Where everything lies that a captured step would read or write, gradients apart."""
    (plan,) = optimizer._engine.plans.values()
    numbers = optimizer._engine.numbers
    assert numbers is not None
    buffers, masks = plan.buffers, plan.reductions.masks
    tensors = {
        "group numbers": numbers.values,
        "arguments": numbers.hyper_table,
        "parameter numbers": plan.parameters,
        "moments": plan.moments.values,
        "coefficients": buffers.coefficients.table,
        "factors": buffers.factors,
        "scales": buffers.scales,
        "keys": buffers.keys,
        "gate of moments": buffers.gates.moments,
        "gate of weights": buffers.gates.weights,
        "sums": buffers.sums,
        "statistics": buffers.stats,
        "masks": None if masks is None else masks.flat,
        "reduced": plan.reductions.table.flat,
    }
    for index, (parameter, state) in enumerate(optimizer.state.items()):
        tensors[f"weights {index}"] = parameter
        # p0 and s are freed once d is frozen.
        kept = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in ("p0", "s")}
        tensors |= {f"{key} {index}": value for key, value in kept.items()}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("free", [True, False], ids=["prompt", "late"])
@pytest.mark.parametrize("name", [*EVERY, *FAMILY])
def test_nothing_that_a_captured_graph_reads_moves_from_step_to_step(name: str, free: bool) -> None:
    """Not when lr changes, a gradient is missing or not finite, d is frozen, or the weights have been averaged."""
    shapes = named_shapes("small")
    parameters = shard_parameters(initial_weights(shapes), SINGLE)
    optimizer: DistributedOptimizer
    if name in FAMILY:
        optimizer = make(name, "default", parameters)
    else:
        optimizer = make_optimizer(parameters, 2, **EVERY[name])
    seen = []
    for step, gradients in enumerate(gradient_sequence(shapes, 9)):
        if step == 3:
            gradients = gradients | {"vector": None}
        if step == 4:
            gradients = gradients | {"vector": torch.full((40,), torch.nan)}
        if step == 5 and name != "beta1_zero":  # Which has no average.
            optimizer.eval()
            optimizer.train()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        take_step(optimizer, parameters, gradients)
        if step:
            for plan in optimizer._engine.plans.values():
                plan.host.free = free
            seen.append(addresses(optimizer))
    assert len(seen[0]) > 14 and all(later == seen[0] for later in seen), set(seen[0].items()) ^ set(seen[-1].items())


def test_counting_sees_what_it_must() -> None:
    with count_host_syncs() as syncs:
        torch.ones(1).item()
    assert syncs.total == 1
