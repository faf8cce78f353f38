"""The closure forms of Schedule-Free: weights are the average between steps, and nothing of it is lost.

That they are their references on every layout: ``tests/test_family.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import ppsf_dist
from ppsf_dist import AdamWScheduleFree, AdamWScheduleFreeClosure, SGDScheduleFree, SGDScheduleFreeClosure
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import take_step

SHAPES = named_shapes("small")
STEPS = 6


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in initial_weights(SHAPES).items()}


def copies(of: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], value) for name, value in b.items())


def test_between_steps_weights_are_what_eval_gives_and_the_closure_sees_what_train_gives() -> None:
    ours, others = parameters(), parameters()
    optimizer = AdamWScheduleFreeClosure(list(ours.values()), lr=0.01)
    other = AdamWScheduleFree(list(others.values()), lr=0.01)
    for gradients in gradient_sequence(SHAPES, STEPS):
        seen: dict[str, Tensor] = {}

        def closure(gradients: Any = gradients, seen: dict[str, Tensor] = seen) -> float:
            seen |= copies(ours)
            set_grads(ours, gradients)
            return 2.5

        assert optimizer.step(closure) == 2.5
        for name, value in copies(others).items():
            torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-6)
        set_grads(others, gradients)
        other.step()
        other.eval()
        for name, value in copies(others).items():
            torch.testing.assert_close(ours[name].detach(), value, rtol=0, atol=1e-6)
        other.train()


def test_eval_and_train_do_nothing() -> None:
    ours = parameters()
    optimizer = SGDScheduleFreeClosure(list(ours.values()), lr=0.1)
    for gradients in gradient_sequence(SHAPES, 2):
        take_step(optimizer, ours, gradients)
    before = copies(ours)
    optimizer.train()
    assert same(copies(ours), before) and not optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    assert same(copies(ours), before)


def without_gradient(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average of a parameter before and after a step in which it has no gradient."""
    of = shard_parameters(initial_weights(SHAPES), LAYOUTS[name])
    optimizer = SGDScheduleFreeClosure(list(of.values()), lr=0.1)
    for gradients in gradient_sequence(SHAPES, 4):
        take_step(optimizer, of, gradients)
    before = gather(of)
    gradients = next(gradient_sequence(SHAPES, 1))
    take_step(optimizer, of, {key: gradient if key == "tall" else None for key, gradient in gradients.items()})
    return before, gather(of)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["single", "fsdp_2", "fsdp_tp_2x2"])
def test_s1_a_parameter_without_a_gradient_keeps_its_average(layout: str) -> None:
    for before, after in run(LAYOUTS[layout].world_size, without_gradient, layout):
        moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
        assert moved == {"tall"}


def test_s1_the_reference_leaves_it_at_y() -> None:
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = schedulefree.SGDScheduleFreeClosure([weight, other], lr=0.5)

    def closure(both: bool) -> float:
        weight.grad = torch.ones(3)
        other.grad = torch.ones(3) if both else None
        return 0.0

    for _ in range(3):
        optimizer.step(lambda: closure(True))
    before = other.detach().clone()
    optimizer.step(lambda: closure(False))
    assert not torch.equal(other.detach(), before)


@pytest.mark.parametrize("late", [False, True])
def test_an_exception_in_the_closure_leaves_every_bit(late: bool) -> None:
    ours = parameters()
    optimizer = SGDScheduleFreeClosure(list(ours.values()), lr=0.1)
    *steps, last = gradient_sequence(SHAPES, 4)
    for gradients in steps:
        take_step(optimizer, ours, gradients)
    before, state = copies(ours), {p: optimizer.state[p]["z"].clone() for p in ours.values()}

    def closure() -> float:
        if late:
            set_grads(ours, last)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same(copies(ours), before) and all(torch.equal(optimizer.state[p]["z"], z) for p, z in state.items())
    assert not optimizer.param_groups[0]["train_mode"] and optimizer.param_groups[0]["k"] == 3
    take_step(optimizer, ours, last)
    assert optimizer.param_groups[0]["k"] == 4 and not same(copies(ours), before)


def test_without_a_closure_the_way_out_is_named() -> None:
    optimizer = SGDScheduleFreeClosure(list(parameters().values()), lr=0.1)
    with pytest.raises(ValueError, match=r"step\(closure\); where nobody .* use SGDScheduleFree with train"):
        optimizer.step()


def test_without_momentum_the_average_is_kept_all_the_same() -> None:
    """The reference divides by zero."""
    ours, others = parameters(), parameters()
    optimizer = SGDScheduleFreeClosure(list(ours.values()), lr=0.1, momentum=0.0)
    z = {name: parameter.detach().clone() for name, parameter in others.items()}
    x = copies(others)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        take_step(optimizer, ours, gradients)
        for name, gradient in gradients.items():
            assert gradient is not None
            z[name] -= 0.1 * gradient
            x[name].lerp_(z[name], 1 / (step + 1))
    for name, value in x.items():
        torch.testing.assert_close(ours[name].detach(), value, rtol=0, atol=1e-6)


def test_a_run_of_the_other_form_goes_on() -> None:
    """Weights and state saved in training mode, at y."""
    whole, parts = parameters(), parameters()
    optimizer: Any = SGDScheduleFree(list(whole.values()), lr=0.1)
    first: Any = SGDScheduleFree(list(parts.values()), lr=0.1)
    second: Any = SGDScheduleFreeClosure(list(parts.values()), lr=0.1)
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        take_step(optimizer, whole, gradients)
        if step == 3:
            second.load_state_dict(first.state_dict())
        take_step(second if step >= 3 else first, parts, gradients)
    optimizer.eval()
    for name, value in copies(whole).items():
        torch.testing.assert_close(parts[name].detach(), value, rtol=0, atol=1e-6)


def test_16_bit_averages_lose_nothing_where_nothing_moves() -> None:
    weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = SGDScheduleFreeClosure([weight], lr=0.5)
    for scale in (1.0, -2.0):
        take_step(optimizer, {"w": weight}, {"w": torch.full((64,), scale, dtype=torch.bfloat16)})
    before = weight.detach().clone()
    for _ in range(5):
        take_step(optimizer, {"w": weight}, {"w": torch.full((64,), torch.nan, dtype=torch.bfloat16)})
    assert torch.equal(weight.detach(), before) and optimizer.skipped_steps == 5


def with_evaluations_between(name: str, evaluate: str) -> tuple[list[float], list[float]]:
    """Losses at the training weights and at the average, of a module whose root stays gathered after a forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    if evaluate != "single":
        fully_shard(model)
    optimizer: Any
    if name == "ScheduleFreeWrapper":
        optimizer = ppsf_dist.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    else:
        optimizer = getattr(ppsf_dist, name)(model.parameters(), lr=0.1)
    x, target = torch.randn(6, 4), torch.randn(6, 1)
    training, averages = [], []

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return float(loss.detach())

    for _ in range(4):
        training.append(optimizer.step(closure))
        if evaluate == "averaged":
            with ppsf_dist.averaged(optimizer, model), torch.no_grad():
                averages.append(float((model(x) - target).square().mean()))
            continue
        optimizer.eval()
        with torch.no_grad():
            averages.append(float((model(x) - target).square().mean()))
        optimizer.train()
    return training, averages


@pytest.mark.dist
@pytest.mark.parametrize("evaluate", ["averaged", "eval and train"])
@pytest.mark.parametrize("name", ["AdamWScheduleFreeClosure", "AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_what_fsdp_keeps_gathered_is_never_taken_for_the_weights(name: str, evaluate: str) -> None:
    """After an evaluation the root holds x gathered, and the training weights are y."""
    (expected,) = run(1, with_evaluations_between, name, "single")
    for losses in run(2, with_evaluations_between, name, evaluate):
        for ours, theirs in zip(losses, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
