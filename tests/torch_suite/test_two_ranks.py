"""torch's suites for FSDP2 and distributed state dicts, in spirit, on two ranks."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.common_dist_composable import CompositeParamModel  # noqa: E402

from tests.harness.models import D0
from tests.harness.pool import run
from tests.test_state import Net, same, train, whole
from tests.torch_suite.problem import CPU, Optimizer, build


def _sharded(frozen: bool) -> tuple[Net, Optimizer]:
    model = Net()
    model.conv.weight.requires_grad_(not frozen)
    model.scale.requires_grad_(not frozen)
    fully_shard(model.embed)
    fully_shard(model)
    return model, Optimizer([{"params": list(model.parameters()), "name": "all"}], d0=D0)


def _round_trips(frozen: bool) -> None:
    """Through torch's functions with each combination of options that they support: bit for bit."""
    model, optimizer = _sharded(frozen)
    train(model, optimizer, 0, 4)
    weights = get_model_state_dict(model)
    weights = {name: cast(Tensor, value).clone() for name, value in weights.items()}
    expected_state = _whole_state(optimizer)
    saved: dict[str, Any] = {}
    for names in OPTIONS:
        settings = StateDictOptions(**cast(Any, dict.fromkeys(names, True)))
        saved[str(names)] = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings))
    train(model, optimizer, 4, 6)
    expected = whole(model)
    for names in OPTIONS:
        settings = StateDictOptions(**cast(Any, dict.fromkeys(names, True)))
        other, fresh = _sharded(frozen)
        set_model_state_dict(other, weights)
        mine = {} if "broadcast_from_rank0" in names and dist.get_rank() else saved[str(names)]
        set_optimizer_state_dict(other, fresh, mine, options=settings)
        assert same(expected_state, _whole_state(fresh)), names
        assert fresh.param_groups[0]["name"] == "all"
        train(other, fresh, 4, 6)
        assert same(expected, whole(other)), names


OPTIONS: list[tuple[str, ...]] = [
    (),
    ("full_state_dict",),
    ("cpu_offload",),
    ("flatten_optimizer_state_dict",),
    ("cpu_offload", "flatten_optimizer_state_dict"),
    ("full_state_dict", "broadcast_from_rank0"),
    ("full_state_dict", "cpu_offload", "broadcast_from_rank0"),
]
"""torch (2.13) cannot load what it has flattened and made full, of no optimizer: KeyError 'param_groups.0.params.0'."""


def _whole_state(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    state: dict[Any, dict[str, Any]] = optimizer.state_dict()["state"]
    return {key: {n: getattr(v, "full_tensor", lambda v=v: v)() for n, v in e.items()} for key, e in state.items()}


def _frozen_as_on_one_device() -> None:
    """With most parameters frozen the terms of Prodigy's numerator cancel; its sum must not depend on their order."""
    torch.manual_seed(3)
    alone = CompositeParamModel(CPU)
    sharded = copy.deepcopy(alone)
    for model in (alone, sharded):
        model.u1.requires_grad_(False)
        model.u2.requires_grad_(False)
    fully_shard(sharded)
    optimizers = Optimizer(alone.parameters()), Optimizer(sharded.parameters())
    for _ in range(10):
        x = torch.rand(8, 100)
        for model, optimizer in zip((alone, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
    one, two = (optimizer.param_groups[0] for optimizer in optimizers)
    for name in ("d", "d_numerator", "d_denom", "weight_sum"):
        assert two[name] == pytest.approx(one[name], rel=5e-7), name


def _one_rank_alone_fails() -> None:
    """What is refused on one rank only changes nothing there; both go on together."""
    model, optimizer = _sharded(False)
    train(model, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    if dist.get_rank():
        damaged = {**before, "param_groups": [{**before["param_groups"][0], "lr": -1}]}
        with pytest.raises(ValueError, match="lr=-1"):
            optimizer.load_state_dict(damaged)
        with pytest.raises(ValueError, match="lr=-1"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1})
    groups = optimizer.state_dict()["param_groups"]
    assert same(before["param_groups"], groups)
    train(model, optimizer, 2, 4)
    other, other_optimizer = _sharded(False)
    train(other, other_optimizer, 0, 4)
    assert same(whole(model), whole(other))


def _built_on_meta() -> None:
    """torch's recipe for large models: build on meta, shard, get memory, then the optimizer."""
    with torch.device("meta"):
        model = nn.Linear(40, 33)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.ones_(p)
    optimizer = build(model.parameters())
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["k"] == 2


def _zero_redundancy() -> None:
    """It is refused, and what the message says in its place works."""
    model = nn.Linear(40, 33)
    for made in (Optimizer, functools.partial(Optimizer, d0=1e-3)):
        with pytest.raises(
            ValueError, match=r"fully_shard\(model\) and ProdigyPlusScheduleFree\(model.parameters\(\)\)"
        ):
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=made)  # type: ignore[arg-type]
    fully_shard(model)
    optimizer = Optimizer(model.parameters())
    model(torch.full((2, 40), 1.0 + dist.get_rank())).sum().backward()
    optimizer.step()
    d: list[Any] = [None, None]
    dist.all_gather_object(d, (optimizer.get_d(), optimizer.param_groups[0]["d_denom"]))
    assert d[0] == d[1]


def _two_ranks() -> None:
    for frozen in (False, True):
        _round_trips(frozen)
    _frozen_as_on_one_device()
    _one_rank_alone_fails()
    _built_on_meta()
    _zero_redundancy()


@pytest.mark.dist
def test_two_ranks() -> None:
    """torch's suites for FSDP2 and distributed state dicts, in spirit."""
    run(2, _two_ranks)
