"""A gradient that is not finite, anywhere, changes nothing, everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppsf_dist import ProdigyPlusScheduleFree
from tests.harness.layouts import LAYOUTS, Layout, local, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.rotation import rotated
from tests.runs import make_optimizer
from tests.switches import EVERY, Switch

SHAPES = named_shapes("small")
DISTRIBUTED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1 and name != "replicated"]


def bits(parameters: dict[str, Any], optimizer: ProdigyPlusScheduleFree) -> list[Any]:
    """Everything that a step may change, as bytes and numbers."""
    seen: list[Any] = []
    for p in parameters.values():
        tensors = [local(p.detach()), *(v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))]
        seen.append([t.contiguous().view(torch.uint8).clone() for t in tensors if t.numel()])
        seen.append({k: v for k, v in optimizer.state[p].items() if not isinstance(v, torch.Tensor)})
    changing = ("params", "skipped_steps")
    seen.append([{k: v for k, v in group.items() if k not in changing} for group in optimizer.param_groups])
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def poison(layout: Layout, switch: Switch, value: float, free: bool = True) -> dict[str, Any]:
    """Three good steps, one bad element on the last rank, one good step; and the same without the bad step."""
    result: dict[str, Any] = {}
    after = []
    for is_bad in (True, False):
        parameters = shard_parameters(initial_weights(SHAPES), layout)
        optimizer = make_optimizer(parameters, 2, **switch)
        for step, gradients in enumerate(gradient_sequence(SHAPES, 5)):
            set_grads(parameters, gradients)
            if step == 3:
                if not is_bad:
                    continue
                optimizer.get_d()
                before = bits(parameters, optimizer)
                rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
                target = next(p for p in parameters.values() if p.grad is not None and local(p.grad).numel() > 1)
                if rank == layout.world_size - 1:
                    assert target.grad is not None
                    local(target.grad).view(-1)[1] = value
            if not free and step > 0:
                for plan in optimizer._engine.plans.values():
                    plan.host.free = False
            optimizer.step()
            if step == 3:
                optimizer.get_d()
                result["unchanged"] = same(before, bits(parameters, optimizer))
                result["skipped"] = optimizer.skipped_steps
        optimizer.get_d()
        after.append(bits(parameters, optimizer))
    result["goes_on_as_if_nothing_had_been"] = same(*after)
    return result


EXPECTED = {"unchanged": True, "skipped": 1, "goes_on_as_if_nothing_had_been": True}


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("switch", ["default", "momentum_cautious", "cautious", "focus", "adopt"])
def test_one_process(switch: str, value: float, free: bool) -> None:
    """``free=False`` is the path of an accelerator, where the device decides alone."""
    assert poison(LAYOUTS["single"], EVERY[switch], value, free) == EXPECTED


@pytest.mark.parametrize("switch", EVERY)
def test_every_switch(switch: str) -> None:
    assert poison(LAYOUTS["single"], EVERY[switch], float("nan"), False) == EXPECTED


SHARED = ("default", "speed", "unfactored_no_stableadamw", "atan2", "adopt", "cautious")


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "switch"), rotated(DISTRIBUTED, SHARED))
def test_every_rank_of_every_layout(layout: str, switch: str) -> None:
    for of_rank in run(LAYOUTS[layout].world_size, poison, LAYOUTS[layout], EVERY[switch], float("nan")):
        assert of_rank == EXPECTED
