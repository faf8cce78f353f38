"""Steps made during the backward pass give the run of ``step()``, and gradients are gone as soon as they are used."""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import step_in_backward
from tests.harness.counting import count_collectives
from tests.harness.layouts import gather, local, set_grads, shard_parameters
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import SINGLE, Run, difference, make_optimizer, open_loop
from tests.switches import EVERY
from tests.test_fsdp import Tied, batch, wrap
from tests.test_layouts import sometimes_missing

SHAPES = named_shapes("small")
STEPS = 8
SWITCHES = [
    "default",
    "speed",
    "adopt",
    "one_d",
    "bias_correction",
    "momentum",
    "cautious",
    "prodigy_steps",
]
BLOCKS_AND_ROOT = 3


def numbers(optimizer: ProdigyPlusScheduleFree) -> list[dict[str, Any]]:
    optimizer.get_d()
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def by_parameter(*, ends: bool, missing: Any = None, dtype: torch.dtype = torch.float32, **switches: Any) -> Run:
    """The run of a trainer that steps each parameter as its gradient arrives, the last one first."""
    parameters = shard_parameters(initial_weights(SHAPES, dtype=dtype), SINGLE)
    optimizer = make_optimizer(parameters, 2, fused_back_pass=True, **switches)
    groups = {p: (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}
    result = Run({}, {}, {})
    for gradients in gradient_sequence(SHAPES, STEPS, missing=missing, dtype=dtype):
        set_grads(parameters, gradients)
        for p in reversed(parameters.values()):
            optimizer.step_parameter(p, *groups[p])
            p.grad = None
        if ends:
            optimizer.step()
            result.groups.append(numbers(optimizer))
    if not ends:
        optimizer.state_dict()
        result.groups.append(numbers(optimizer))
    result.weights = gather(parameters)
    return result


@pytest.mark.parametrize("switch", SWITCHES)
def test_parameter_by_parameter_is_the_same_run(switch: str) -> None:
    reference = open_loop(SINGLE, SHAPES, STEPS, groups=2, missing=sometimes_missing, **EVERY[switch])
    ours = by_parameter(ends=True, missing=sometimes_missing, **EVERY[switch])
    apart = difference(ours, reference)
    assert apart["d"] <= 1e-6 and apart["weights"] <= 1e-5, apart
    assert ours.numbers("k") == reference.numbers("k")
    assert torch.equal(ours.weights["short"], reference.start["short"])


def test_stochastic_rounding_is_the_same() -> None:
    reference = open_loop(SINGLE, SHAPES, STEPS, groups=2, dtype=torch.bfloat16)
    ours = by_parameter(ends=True, dtype=torch.bfloat16)
    for name, expected in reference.weights.items():
        assert torch.equal(ours.weights[name], expected), name


@pytest.mark.parametrize("switch", ["default", "speed"])
def test_a_trainer_that_never_calls_step(switch: str) -> None:
    reference = open_loop(SINGLE, SHAPES, STEPS, groups=2, **EVERY[switch])
    ours = by_parameter(ends=False, **EVERY[switch])
    reference.groups = reference.groups[-1:]
    apart = difference(ours, reference)
    assert apart["d"] <= 1e-6 and apart["weights"] <= 1e-5, apart
    assert ours.numbers("k") == reference.numbers("k")


def test_a_trainer_may_pass_a_group_that_is_no_longer_in_use() -> None:
    p = nn.Parameter(torch.ones(40, 40))
    optimizer = ProdigyPlusScheduleFree([p], d0=D0, fused_back_pass=True)
    kept = dict(optimizer.param_groups[0])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.ones_like(p)
    optimizer.step_param(p, kept)
    optimizer.step()
    assert kept["lr"] == 1.0 and optimizer.param_groups[0]["k"] == 2
    assert torch.equal(p, torch.ones_like(p)), "lr of the group that is in use now"


def test_step_without_a_backward_pass_changes_nothing_but_creates_state() -> None:
    parameters = shard_parameters(initial_weights(SHAPES), SINGLE)
    optimizer = make_optimizer(parameters, 2, fused_back_pass=True)
    before, start = numbers(optimizer), initial_weights(SHAPES)
    optimizer.step()
    assert all(set(optimizer.state[p]) >= {"z", "p0", "s"} for p in parameters.values())
    assert numbers(optimizer) == before
    assert all(torch.equal(p, start[name]) for name, p in parameters.items())


def test_gradients_that_no_one_uses_are_reported() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = ProdigyPlusScheduleFree([p], fused_back_pass=True)
    p.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="step_in_backward"):
        optimizer.step()


def test_errors_name_the_way_out() -> None:
    p, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad = other.grad = torch.ones(3)
    with pytest.raises(ValueError, match="fused_back_pass=True"):
        ProdigyPlusScheduleFree([p]).step_param(p)
    with pytest.raises(ValueError, match="fused_back_pass=True"):
        step_in_backward(nn.Linear(2, 2), ProdigyPlusScheduleFree([p]))
    optimizer = ProdigyPlusScheduleFree([p], fused_back_pass=True)
    with pytest.raises(ValueError, match="param_groups"):
        optimizer.step_param(other)
    optimizer.eval()
    with pytest.raises(RuntimeError, match="optimizer.train()"):
        optimizer.step_param(p)


def test_a_second_backward_pass_and_a_closure_are_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    handle = step_in_backward(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="accumulating"):
        model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    handle.remove()
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def train(how: str, *, in_backward: bool, micro_batches: int = 1, **switches: Any) -> dict[str, Any]:
    """A user's loop. Returns d and k of each step, the weights, and what was counted."""
    model = wrap(Tied(), how)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0, fused_back_pass=in_backward, **switches)
    handle = step_in_backward(model, optimizer) if in_backward else None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    result: dict[str, Any] = {"d": [], "k": []}
    for step in range(10):
        # The same again: d moves only while gradients agree.
        parts = batch(0).chunk(world)[rank].chunk(micro_batches)
        with count_collectives() as collectives:
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(last)
                waits = handle is not None and not last and not isinstance(model, FSDPModule)
                with handle.accumulating() if handle is not None and waits else nullcontext():
                    (loss_of(model, part) / micro_batches).backward()
            optimizer.step()
        if in_backward:
            assert all(p.grad is None for p in model.parameters())
        if step == 2:
            # A micro-batch that was skipped, as after a bad batch.
            optimizer.zero_grad()
            if in_backward:
                optimizer.step()
        optimizer.zero_grad()
        result["d"].append(optimizer.get_d())
        result["k"].append([group["k"] for group in optimizer.param_groups])
    result["reductions"] = collectives.names["allreduce_"]
    result["beside the backward pass"] = collectives.asynchronous
    result["weights"] = gather(dict(model.named_parameters()))
    result["state"] = sorted(tuple(sorted(state)) for state in optimizer.state.values())
    return result


def compare(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    assert ours["k"] == reference["k"]
    torch.testing.assert_close(torch.tensor(ours["d"]), torch.tensor(reference["d"]), rtol=1e-6, atol=0)
    assert reference["d"][-1][0] > 1.5 * reference["d"][0][0], "the test needs a d that moves"
    for name, expected in reference["weights"].items():
        torch.testing.assert_close(ours["weights"][name], expected, rtol=1e-5, atol=2e-7)
    assert ours["state"] == reference["state"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_plain_model(micro_batches: int) -> None:
    ours = train("single", in_backward=True, micro_batches=micro_batches)
    compare(ours, train("single", in_backward=False, micro_batches=micro_batches))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "how", "micro_batches"),
    [(2, "default", 1), (2, "default", 2), (2, "mixed", 1), (2, "offload", 1), (4, "hsdp", 1)],
)
def test_fully_shard(world_size: int, how: str, micro_batches: int) -> None:
    ours = run(world_size, train_in_backward, how, micro_batches)
    reference = run(world_size, train_as_usual, how, micro_batches)
    assert all(other["d"] == ours[0]["d"] for other in ours)
    compare(ours[0], reference[0])
    if how == "default":
        assert (ours[0]["reductions"], reference[0]["reductions"]) == (2 * BLOCKS_AND_ROOT, 2)
        ahead = [of[0]["beside the backward pass"] for of in (ours, reference)]
        assert ahead == [BLOCKS_AND_ROOT, 0], "reduce 1 of each group waits for nobody"


def train_in_backward(how: str, micro_batches: int) -> dict[str, Any]:
    return train(how, in_backward=True, micro_batches=micro_batches)


def train_as_usual(how: str, micro_batches: int) -> dict[str, Any]:
    return train(how, in_backward=False, micro_batches=micro_batches)


def beside_fsdp() -> dict[str, Any]:
    """A plain parameter that FSDP ignores waits for ``step()``; ``step_param`` refuses the sharded ones."""
    torch.manual_seed(0)
    weights = {}
    for in_backward in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        bias = model[1].bias
        assert isinstance(bias, nn.Parameter)
        fully_shard(model, ignored_params={bias})
        optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0, fused_back_pass=in_backward)
        if in_backward:
            step_in_backward(model, optimizer)
        for _ in range(3):
            model(torch.ones(2, 5)).square().sum().backward()
            if in_backward:
                assert [p.grad is None for p in model.parameters()] == [True, True, True, False]
            optimizer.step()
            optimizer.zero_grad()
        weights[in_backward] = gather(dict(model.named_parameters()))
        if in_backward:
            sharded = model[0].weight
            assert isinstance(sharded, Tensor)
            sharded.grad = torch.zeros_like(sharded)
            with pytest.raises(RuntimeError, match="step_in_backward"):
                optimizer.step_param(sharded)
    for name, expected in weights[False].items():
        torch.testing.assert_close(weights[True][name], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        step_in_backward(DistributedDataParallel(nn.Linear(2, 2)), optimizer_for_nothing())
    return {}


def optimizer_for_nothing() -> ProdigyPlusScheduleFree:
    return ProdigyPlusScheduleFree([nn.Parameter(torch.ones(1))], fused_back_pass=True)


@pytest.mark.dist
def test_parameters_that_fsdp_leaves_alone() -> None:
    run(2, beside_fsdp)


def bad_block() -> dict[str, Any]:
    """One gradient of block 0 is infinite on one rank; its block is stepped last."""
    model = wrap(Tied(), "default")
    assert isinstance(model, FSDPModule) and isinstance(model.blocks, nn.ModuleList)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0, fused_back_pass=True)
    block = model.blocks[0]
    assert isinstance(block, nn.Sequential) and isinstance(block[1].bias, Tensor)
    bad = block[1].bias
    poison = {"on": False}

    def spoil(param: Tensor) -> None:
        if poison["on"] and dist.get_rank() == 1:
            assert isinstance(param.grad, DTensor)
            param.grad.to_local()[-1] = float("inf")

    bad.register_post_accumulate_grad_hook(spoil)
    step_in_backward(model, optimizer)
    moved = defaultdict(list)
    for on in (False, True, False):
        poison["on"] = on
        before = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
        numbers_before = numbers(optimizer)
        loss_of(model, batch(0).chunk(2)[dist.get_rank()]).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            moved[name].append(not torch.equal(local(p), before[name]))
        same = [{k: v for k, v in g.items() if k != "skipped_steps"} for g in numbers(optimizer)] == [
            {k: v for k, v in g.items() if k != "skipped_steps"} for g in numbers_before
        ]
        assert same == on
    return {"moved": dict(moved), "skipped": optimizer.skipped_steps, "k": optimizer.param_groups[0]["k"]}


@pytest.mark.dist
def test_a_gradient_that_is_not_finite_skips_its_group_and_d_on_all_ranks() -> None:
    for result in run(2, bad_block):
        assert (result["skipped"], result["k"]) == (1, 3)
        assert result["moved"]["blocks.0.1.weight"] == result["moved"]["blocks.0.1.bias"] == [True, False, True]
        assert result["moved"]["blocks.1.1.weight"] == [True, True, True]


def checkpointed() -> bool:
    """The step that distributed checkpoints make to create state creates it all, and changes nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = wrap(Tied(), "default")
        optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
        step_in_backward(model, optimizer)
        before = gather(dict(model.named_parameters()))
        groups = numbers(optimizer)
        state_dict = get_optimizer_state_dict(model, optimizer)
    after = gather(dict(model.named_parameters()))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert numbers(optimizer) == groups
    return set(state_dict["state"]) == set(before)


@pytest.mark.dist
def test_distributed_checkpoints_create_state() -> None:
    assert all(run(2, checkpointed))
