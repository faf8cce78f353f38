"""A captured step: rehearsed on a CPU, with Triton's interpreter and a recorder in place of CUDA's graphs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ppsf_dist import CapturedStep, ProdigyPlusScheduleFree
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.family import FAMILY, make
from tests.harness import graph
from tests.harness.kernels import interpreted
from tests.harness.layouts import LAYOUTS, local, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights
from tests.harness.pool import run
from tests.runs import make_optimizer
from tests.switches import EVERY

SHAPES = [("matrix", (40, 12)), ("vector", (7,))]
STEPS = 8


class Rehearsed(CapturedStep):
    """Recording runs too, so what it writes is taken back: a real graph only records."""

    recordings = 0

    def __init__(self, optimizer: DistributedOptimizer, **arguments: Any) -> None:
        super().__init__(optimizer, **arguments)
        self._record = self._recorded

    def _recorded(self, function: Callable[[], object]) -> Callable[[], object]:
        self.recordings += 1
        engine = self._engine
        (plan,) = engine.plans.values()
        assert engine.numbers is not None
        kept = [engine.numbers.values, plan.parameters, plan.moments.values]
        kept += [shard.weights() for shard in plan.shards]
        for entries in self._optimizer.state.values():
            kept += [value for value in entries.values() if isinstance(value, Tensor)]
        for part in plan.passes.parts:
            kept += [packed for packed in part.passes._memory.packed if packed is not None]  # type: ignore[attr-defined]
        before = [tensor.detach().clone() for tensor in kept]
        replay = graph.record(function)
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.data.copy_(value)
            for part in plan.passes.parts:
                part.passes._plan.done.zero_()  # type: ignore[attr-defined]
        return replay


def trained(layout: str, name: str, switch: dict[str, Any], *, captured: bool) -> dict[str, Any]:
    """A run in which a gradient moves, is missing, and is not finite, numbers change and weights are averaged."""
    start = initial_weights(SHAPES)
    parameters = shard_parameters(start, LAYOUTS[layout])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(name, "default", parameters) if name in FAMILY else make_optimizer(parameters, 2, **switch)
    step = Rehearsed(optimizer, warm_up=1) if captured else None
    told = []
    optimizer.register_step_post_hook(lambda *_: told.append(optimizer.param_groups[0]["k"]))
    for number, gradients in enumerate(gradient_sequence(SHAPES, STEPS)):
        if number == 3:
            gradients["vector"] = None
        if number == 4:
            assert gradients["matrix"] is not None
            gradients["matrix"][0, 0] = torch.inf
        if number == 5:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        if number == 6:
            optimizer.eval()
            optimizer.train()
        set_grads(parameters, gradients)
        if number == 1:
            # After the first plan is made, before anything is captured.
            optimizer._engine.host.free = False  # type: ignore[union-attr]
        if step is None:
            optimizer.step()
        else:
            step()
        for p in parameters.values():
            p.grad = None
    optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
    weights = {key: value.detach().clone() for key, value in parameters.items()}
    local = {key: value.to_local() if hasattr(value, "to_local") else value for key, value in weights.items()}
    return {"groups": groups, "weights": local, "recordings": step and step.recordings, "told": len(told)}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "name"),
    [("single", "default"), ("fsdp_2", "default"), ("single", "cautious"), ("single", "Prodigy"), ("fsdp_3", "speed")],
)
def test_a_captured_run_is_the_run_bit_for_bit(layout: str, name: str) -> None:
    world = LAYOUTS[layout].world_size
    ours, usual = (run(world, interpreted, _trained, layout, name, captured) for captured in (True, False))
    for one, other in zip(ours, usual, strict=True):
        assert one["groups"] == other["groups"]
        for key, value in other["weights"].items():
            assert torch.equal(one["weights"][key], value), key
        assert one["recordings"] == 1
        assert one["told"] == other["told"] == STEPS


def _trained(layout: str, name: str, captured: bool) -> dict[str, Any]:
    return trained(layout, name, EVERY.get(name, {}), captured=captured)


def _after_changes() -> list[int]:
    """How many times a step has been captured after each change."""
    p = nn.Parameter(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) * 0.02)
    optimizer = ProdigyPlusScheduleFree([p], prodigy_steps=12)
    step = Rehearsed(optimizer, warm_up=2)

    def steps(count: int) -> int:
        for _ in range(count):
            p.grad = torch.full_like(p, 0.01)
            step()
        return step.recordings

    found = [steps(2), steps(3)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found.append(steps(3))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    found.append(steps(3))
    # d is frozen on the way.
    found.append(steps(4))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.1})
    found.append(steps(1))
    assert optimizer.param_groups[0]["k"] == 17
    return found


@pytest.mark.dist
def test_what_has_changed_is_captured_anew() -> None:
    assert run(1, interpreted, _after_changes)[0] == [0, 1, 2, 3, 4, 4]


def _one_rank_fails() -> list[str]:
    """What each call of a captured step raises, when one rank has a gradient that cannot be stepped in the fourth."""
    layout = LAYOUTS["fsdp_2"]
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters)
    step = Rehearsed(optimizer, warm_up=1)
    said, before = [], {}
    for number, gradients in enumerate(gradient_sequence(SHAPES, 6)):
        set_grads(parameters, gradients)
        p = parameters["vector"]
        if number == 1:
            optimizer._engine.host.free = False  # type: ignore[union-attr]
        if number == 3:
            before = {name: local(value.detach()).clone() for name, value in parameters.items()}
            if dist.get_rank() == 1:
                assert isinstance(p.grad, DTensor)
                p.grad._local_tensor = torch.ones(0)
        try:
            step()
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        if number == 3:
            assert all(torch.equal(local(value), before[name]) for name, value in parameters.items())
    return said


@pytest.mark.dist
def test_a_rank_that_cannot_step_is_waited_for_by_nobody() -> None:
    """The sums that the others replay are those in which it says so; they hear of it with the numbers of that step."""
    first, second = run(2, interpreted, _one_rank_fails)
    assert second[3].startswith("ValueError: the gradient of")
    (heard,) = [one for one in first if one]
    assert "Disagreement: an earlier step changed nothing on any rank" in heard
    assert not any(first[:3]) and not any(second[:3])


def test_what_cannot_be_captured_is_refused() -> None:
    p = nn.Parameter(torch.ones(40, 12))
    with pytest.raises(TypeError, match="SGD has no step to capture"):
        CapturedStep(torch.optim.SGD([p]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fused_back_pass=False"):
        CapturedStep(ProdigyPlusScheduleFree([p], fused_back_pass=True))
    optimizer = ProdigyPlusScheduleFree([p])
    with pytest.raises(ValueError, match="warm_up=0 must be at least 1"):
        CapturedStep(optimizer, warm_up=0)
    step = CapturedStep(optimizer, warm_up=1)
    p.grad = torch.ones_like(p)
    step()
    before = p.detach().clone()
    optimizer._engine._torn = "step() was ended by a test"
    with pytest.raises(RuntimeError, match="step.. was ended by a test"):
        step()
    optimizer._engine._torn = None
    with pytest.raises(RuntimeError, match="because only Triton's kernels .* set PPSF_KERNELS=native"):
        step()
    assert torch.equal(p, before)
