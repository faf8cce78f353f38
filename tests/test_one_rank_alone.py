"""What happens on one rank alone in mid-run: every rank raises, says which one and why, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ppsf_dist import ProdigyPlusScheduleFree, check_replicas
from tests.harness.layouts import LAYOUTS, Layout, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import make_optimizer
from tests.test_nonfinite import bits, same

pytestmark = pytest.mark.dist

SHAPES = named_shapes("small")
ODD = 1
"""The rank that is not like the others."""
Parameters = dict[str, Any]
Fault = Callable[[Parameters, ProdigyPlusScheduleFree], Any]


def raising() -> float:
    raise ZeroDivisionError("a batch without tokens")


def sparse(parameters: Parameters) -> None:
    """A gradient of a layout that no formula is for, in place of the dense one."""
    parameter = parameters["tall"]
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    gradient = torch.zeros_like(local).to_sparse()
    if hasattr(parameter.grad, "_local_tensor"):
        parameter.grad._local_tensor = gradient
    else:
        parameter.grad = gradient


def other_state(optimizer: ProdigyPlusScheduleFree) -> None:
    state = optimizer.state_dict()
    if dist.get_rank() == ODD:
        optimizer.load_state_dict(state)


def one_more_group(optimizer: ProdigyPlusScheduleFree) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


def in_eval_mode(optimizer: ProdigyPlusScheduleFree) -> None:
    optimizer.eval()


FAULTS: dict[str, tuple[Fault, str]] = {
    "closure": (lambda p, o: raising, "rank 1: ZeroDivisionError: a batch without tokens"),
    "frozen": (lambda p, o: p["tall"].requires_grad_(False), "rank 1: other parameters are trained"),
    "all frozen": (lambda p, o: [q.requires_grad_(False) for q in p.values()], "rank 1: other parameters are trained"),
    "sparse": (lambda p, o: sparse(p), "rank 1: ValueError: the gradient of parameter 4 "),
    "group": (lambda p, o: one_more_group(o), "rank 1: a parameter group has been added"),
    "eval": (lambda p, o: in_eval_mode(o), "rank 1: RuntimeError: step() was called while the parameters"),
    "switch": (lambda p, o: o.param_groups[1].update(use_cautious=True), "rank 1: cautious of parameter group 1"),
    "steps": (
        lambda p, o: o.param_groups[0].update(prodigy_steps=9),
        "rank 1: prodigy_steps of parameter group 0 has changed from 0 to 9",
    ),
}


def one_rank_alone(layout: Layout) -> dict[str, tuple[str, bool, bool]]:
    """For each fault: the error of this rank, whether nothing has changed, and whether a run without it goes on."""
    seen = {}
    for name, (fault, _) in FAULTS.items():
        parameters = shard_parameters(initial_weights(SHAPES), layout)
        optimizer = make_optimizer(parameters, 2)
        sequence = list(gradient_sequence(SHAPES, 4))
        for gradients in sequence[:2]:
            set_grads(parameters, gradients)
            optimizer.step()
        set_grads(parameters, sequence[2])
        optimizer.get_d()
        closure = fault(parameters, optimizer) if dist.get_rank() == ODD else None
        before = bits(parameters, optimizer)
        message = ""
        try:
            optimizer.step(closure if callable(closure) else None)
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            message = f"{type(error).__name__}: {error}"
        optimizer.get_d()
        unchanged = same(before, bits(parameters, optimizer))
        retried = True
        if name in ("closure", "sparse"):
            # Nothing of the fault is left: the same step again is that of a run without it.
            set_grads(parameters, sequence[2])
            optimizer.step()
            other = shard_parameters(initial_weights(SHAPES), layout)
            undisturbed = make_optimizer(other, 2)
            for gradients in sequence[:3]:
                set_grads(other, gradients)
                undisturbed.step()
            undisturbed.get_d()
            optimizer.get_d()
            retried = same(bits(parameters, optimizer), bits(other, undisturbed))
        seen[name] = (message, unchanged, retried)
    return seen


@pytest.mark.parametrize("layout", ["fsdp_2", "hsdp_2x2", "fsdp_tp_2x2", "mixed"])
def test_the_step_is_nobodys_and_all_know_why(layout: str) -> None:
    told = run(LAYOUTS[layout].world_size, one_rank_alone, LAYOUTS[layout])
    for name, (_, cause) in FAULTS.items():
        for rank, of_rank in enumerate(told):
            message, unchanged, retried = of_rank[name]
            assert unchanged and retried, (name, rank, message)
            assert (cause if rank != ODD else cause.removeprefix("rank 1: ")) in message, (name, rank)


def loads_alone(layout: Layout) -> str:
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2)
    for gradients in gradient_sequence(SHAPES, 2):
        set_grads(parameters, gradients)
        optimizer.step()
    other_state(optimizer)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_load_state_dict_on_one_rank() -> None:
    for message in run(2, loads_alone, LAYOUTS["fsdp_2"]):
        assert "rank 1: load_state_dict() has been called" in message


def first_closure_raises(layout: Layout) -> str:
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2)
    set_grads(parameters, next(iter(gradient_sequence(SHAPES, 1))))
    try:
        optimizer.step(raising if dist.get_rank() == ODD else lambda: 0.0)
    except (RuntimeError, ZeroDivisionError) as error:
        return str(error)
    return ""


def test_a_closure_that_raises_in_the_first_step() -> None:
    others, own = run(2, first_closure_raises, LAYOUTS["fsdp_2"])
    assert "rank 1: ZeroDivisionError: a batch without tokens" in others
    assert own == "a batch without tokens"


def does_not_come(layout: Layout) -> str:
    """Rank 1 leaves out a step."""
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    group = dist.new_group(timeout=timedelta(seconds=2))
    optimizer = ProdigyPlusScheduleFree(list(parameters.values()), process_group=group)
    for gradients in gradient_sequence(SHAPES, 2):
        set_grads(parameters, gradients)
        optimizer.step()
    try:
        if dist.get_rank() != ODD:
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_does_not_come_is_waited_for_by_name() -> None:
    waiting, _ = run(2, does_not_come, LAYOUTS["fsdp_2"])
    assert waiting.startswith("rank 0 waited for sum 1 of 2 of step() with ranks (0, 1), and not all of them came")


def changes_in_mid_run(layout: Layout) -> list[str]:
    """What check_replicas() says of numbers and names that one rank changes where no plan is made anew."""
    messages = []
    changes: list[Callable[[ProdigyPlusScheduleFree], Any]] = [
        lambda o: o.param_groups[0].update(lr=0.5),
        lambda o: o.param_groups[1].update(d_coef=2.0),
        lambda o: setattr(o._engine, "seed", 5),
    ]
    for change in changes:
        parameters = shard_parameters(initial_weights(SHAPES), layout)
        optimizer = make_optimizer(parameters, 2)
        for gradients in gradient_sequence(SHAPES, 2):
            set_grads(parameters, gradients)
            optimizer.step()
        check_replicas(optimizer)
        if dist.get_rank() == ODD:
            change(optimizer)
        try:
            check_replicas(optimizer)
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("layout", ["replicated", "fsdp_2"])
def test_what_one_rank_changes_in_mid_run_is_found_by_check_replicas(layout: str) -> None:
    for messages in run(2, changes_in_mid_run, LAYOUTS[layout]):
        lr, d_coef, seed = messages
        assert lr.startswith("lr of parameter group 0 is 1.0 on rank 0 and 0.5 on rank 1")
        assert d_coef.startswith("d_coef of parameter group 1 is 1.0 on rank 0 and 2.0 on rank 1")
        assert seed.startswith("seed of the optimizer is 0 on rank 0 and 5 on rank 1")


def skips_alone(layout: Layout) -> str:
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 3)):
        set_grads(parameters, gradients)
        if step == 1 and dist.get_rank() == ODD:
            gradient = parameters["tall"].grad
            assert gradient is not None
            gradient[0, 0] = float("nan")
        optimizer.step()
    try:
        check_replicas(optimizer)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_gradient_that_one_rank_of_ddp_damages_after_the_all_reduce_is_found() -> None:
    """Copies step without a word to each other: README says so, and what finds it."""
    for message in run(2, skips_alone, LAYOUTS["replicated"]):
        assert " is " in message and "on rank 0 and " in message and "on rank 1" in message
