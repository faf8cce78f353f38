"""A kind of sharding of one's own needs no change but its registration, and what nobody uses is not imported."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree, averaged, clip_grad_norm_
from ppsf_dist.dry_run import Forecast, Model, Slice, forecast
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from ppsf_dist.sharding import Group, Layout, Member, Part, Shard, find_shards, flat_range, register, registry
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import make_optimizer

SHAPES = named_shapes("small")
STEPS = 6
RANKS = 3
MAX_NORM = 1e-2


@dataclass(eq=False)
class PaddedSlice(Shard):
    """A range of the flattened parameter at the head of a padded tensor."""

    def weights(self) -> Tensor:
        return self.local(self.param)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.detach().narrow(0, 0, self.numel)


def bounds(shape: Sequence[int]) -> tuple[int, int, int]:
    """Where this rank's elements begin, how many there are, and how many a rank has with padding."""
    numel = math.prod(shape)
    padded = -(-numel // dist.get_world_size())
    start = min(dist.get_rank() * padded, numel)
    return start, min(padded, numel - start), padded


def cut(value: Tensor) -> Tensor:
    start, numel, padded = bounds(value.shape)
    return torch.cat([value.reshape(-1)[start : start + numel], torch.full((padded - numel,), math.nan)])


def is_padded(param: Tensor) -> bool:
    return hasattr(param, "_shape_of_the_toy")


def padded_slices(params: Sequence[Any], beside: Sequence[Shard]) -> list[Shard]:
    everyone = tuple(range(dist.get_world_size()))
    shards: list[Shard] = []
    for param in params:
        shape = param._shape_of_the_toy
        start, numel, _ = bounds(shape)
        shards.append(PaddedSlice(param, shape, tuple(flat_range(shape, start, numel)), domain=everyone))
    return shards


def steps(parameters: dict[str, Any]) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The averaged weights after a run with clipping, and d after each step."""
    optimizer, d = make_optimizer(parameters, 2), []
    for gradients in gradient_sequence(SHAPES, STEPS):
        for name, parameter in parameters.items():
            gradient = gradients[name]
            assert gradient is not None
            parameter.grad = cut(gradient) if is_padded(parameter) else gradient.clone()
        clip_grad_norm_(parameters.values(), MAX_NORM)
        optimizer.step()
        d.append(optimizer.get_d())
    optimizer.eval()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, d


def on_slices() -> tuple[dict[str, Tensor], list[list[float]]]:
    """On this rank's slices; every third parameter is whole on every rank."""
    register("shards", "toy", is_padded, f"{__name__}:padded_slices")
    parameters: dict[str, Any] = {}
    for index, (name, weights) in enumerate(initial_weights(SHAPES).items()):
        parameters[name] = nn.Parameter(weights.clone() if index % 3 == 2 else cut(weights))
        if index % 3 != 2:
            parameters[name]._shape_of_the_toy = tuple(weights.shape)
    return steps(parameters)


@pytest.mark.dist
def test_registered_shards_make_the_step_of_one_process() -> None:
    expected, expected_d = steps({name: nn.Parameter(w.clone()) for name, w in initial_weights(SHAPES).items()})
    by_rank = run(RANKS, on_slices)
    for _, d in by_rank:
        assert d == by_rank[0][1]
        for ours, theirs in zip(d, expected_d, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        assert any(d[-1][0] != before[0] for before in d), "the step size has moved"
    for name, value in expected.items():
        pieces = [weights[name] for weights, _ in by_rank]
        if pieces[0].shape != value.shape:
            whole = torch.cat(pieces)
            assert whole[value.numel() :].isnan().all(), "padding is left alone"
            pieces = [whole[: value.numel()].view(value.shape)]
        for piece in pieces:
            torch.testing.assert_close(piece, value, rtol=1e-5, atol=1e-6)


class MastersLayout(Layout):
    """A framework that lets the optimizer step double-precision copies."""

    def members(self, part: Part) -> list[Member]:
        return [Member(p, index, 0) for index, group in enumerate(self.groups) for p in group["params"]]

    def refresh(self) -> None:
        for group, params in zip(self.groups, self.given, strict=True):
            for master, param in zip(group["params"], params, strict=True):
                param.data.copy_(master)


def are_masters(groups: Sequence[Group], given: Sequence[Sequence[Tensor]]) -> bool:
    return any(hasattr(param, "_master_of_the_toy") for group in groups for param in group["params"])


def test_a_registered_layout_is_chosen_and_told_of_swaps() -> None:
    register("layout", "toy", are_masters, f"{__name__}:MastersLayout")
    param = nn.Parameter(torch.ones(5))
    optimizer = ProdigyPlusScheduleFree([param], d0=D0)
    master: Any = param.detach().double().requires_grad_()
    master._master_of_the_toy = True
    optimizer.param_groups[0]["params"] = [master]
    for _ in range(3):
        master.grad = torch.ones_like(master)
        optimizer.step()
    assert isinstance(optimizer._engine.current_layout(), MastersLayout)
    with averaged(optimizer):
        assert torch.equal(param, master.float()) and not torch.equal(param, torch.ones(5))


def one_rank(strategy: str, model: Model, world_size: int, shards: int | None) -> Forecast:
    whole = model.share(Slice(shape, dtype, 0, math.prod(shape), n) for (shape, dtype), n in model.count.items())
    return Forecast(strategy, (whole, *[model.share([])] * (world_size - 1)), ())


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers here is forgotten after it."""
    for question, entries in registry._ENTRIES.items():
        monkeypatch.setitem(registry._ENTRIES, question, list(entries))


@pytest.mark.usefixtures("forgotten")
def test_a_registered_strategy_can_be_forecast() -> None:
    register("strategy", "toy", "toy".__eq__, f"{__name__}:one_rank")
    (group,) = ProdigyPlusScheduleFree([torch.zeros(1, requires_grad=True)]).param_groups
    foreseen = forecast([((4, 4), torch.float32)], PRODIGY_PLUS.switches(group), "toy", 3)
    assert [share.elements for share in foreseen.shares] == [16, 0, 0]


def twice(params: Sequence[Tensor], beside: Sequence[Shard]) -> list[Shard]:
    return [Shard(param, (2, *param.shape), ()) for param in params]


def never(params: Sequence[Tensor], beside: Sequence[Shard]) -> list[Shard]:
    raise AssertionError("another one has taken its name")


def test_who_registers_last_is_asked_first_and_takes_the_name() -> None:
    param: Any = torch.zeros(3)
    param._twice = True
    register("shards", "twice", lambda p: hasattr(p, "_twice"), f"{__name__}:never")
    register("shards", "twice", lambda p: hasattr(p, "_twice"), f"{__name__}:twice")
    assert [shard.shape for shard in find_shards([torch.zeros(3), param], None)] == [(3,), (2, 3)]


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        (
            "tensors",
            "module:function",
            "is never asked: allowed are refused, shards, layout, caller",
        ),
        ("shards", "module.function", "write 'package.module:function'"),
        ("shards", "module:", "write 'package.module:function'"),
    ],
)
def test_what_cannot_be_registered_is_named(question: Any, answer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register(question, "toy", is_padded, answer)


def test_one_device_imports_no_framework() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import ppsf_dist
heavy = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo",
         "torch._inductor", "sympy", "deepspeed", "ppsf_dist.fsdp", "ppsf_dist.deepspeed", "ppsf_dist.zero", "triton")
brought = set(sys.modules) - before
assert not [name for name in brought if name.startswith(heavy)], brought
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = ppsf_dist.ProdigyPlusScheduleFree([parameter])
parameter.grad = torch.ones(3)
ppsf_dist.clip_grad_norm_([parameter], 1.0)
optimizer.step()
with ppsf_dist.averaged(optimizer, torch.nn.Linear(1, 1)):
    ppsf_dist.check_replicas(optimizer)
of_frameworks = ("ppsf_dist.fsdp", "ppsf_dist.deepspeed", "ppsf_dist.zero")
assert not [name for name in sys.modules if name.startswith(of_frameworks)]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
