"""What a dry run says, against ranks that really run."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ppsf_dist
from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.dry_run import Share, forecast
from ppsf_dist.kernels.eager.passes import EagerPasses
from ppsf_dist.methods.switches import Switches
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.bootstrap import launchers
from tests.harness.counting import count_collectives
from tests.harness.kernels import kernels
from tests.harness.layouts import local
from tests.harness.pool import run
from tests.switches import EVERY

RANKS = 4
CHOSEN = ["default", "momentum", "speed", "unfactored", "low_factors", "adopt", "cautious", "focus", "no_stableadamw"]
CHOSEN += ["unfactored_cautious", "adopt_no_stableadamw", "no_quirks", "prodigy_never"]
MESHES = {"fsdp": (RANKS,), "hsdp": (2, 2)}


def make_model(dtype: torch.dtype) -> nn.Module:
    """Rows that do not divide by the ranks, one parameter with fewer rows than ranks, one too small to factor."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 50), nn.Tanh(), nn.Linear(50, 7), nn.Linear(7, 3)).to(dtype)


SISTERS = {
    "Prodigy": {"slice_p": 3}, "AdamWScheduleFree": {}, "SGDScheduleFree": {}, "RAdamScheduleFree": {},
}  # fmt: skip


def build(name: str, parameters: Any) -> DistributedOptimizer:
    """A sister by her name, or ProdigyPlusScheduleFree with one of its switches, on the kernels that are forecast."""
    with kernels("eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in SISTERS:
            made: DistributedOptimizer = getattr(ppsf_dist, name)(parameters, **SISTERS[name])
            return made
        return ProdigyPlusScheduleFree(parameters, **EVERY[name])


def switches_of(optimizer: DistributedOptimizer) -> Switches:
    (group,) = optimizer.param_groups
    return optimizer.method.switches_now(group)


def size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def held(model: nn.Module, optimizer: DistributedOptimizer) -> Share:
    """What this process holds, from the tensors that are there."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return replace(
        held_as_state(optimizer, parameters),
        elements=sum(local(p).numel() for p in parameters),
        weights=size(local(p) for p in parameters),
        gradients=size(local(p.grad) for p in parameters if p.grad is not None),
    )


def held_as_state(optimizer: DistributedOptimizer, parameters: list[nn.Parameter]) -> Share:
    (plan,) = optimizer._engine.plans.values()
    assert optimizer._engine.numbers is not None
    sums = plan.reductions
    tables_of_sums = [table.flat for table in (sums.table, sums.masks) if table is not None]

    def state(*names: str) -> int:
        return size(local(optimizer.state[p][name]) for p in parameters for name in names if name in optimizer.state[p])

    tables = [v for name, v in vars(plan.moments).items() if isinstance(v, Tensor) and name != "values"]
    (passes,) = [passes for passes, _, _ in plan.passes.parts]
    assert isinstance(passes, EagerPasses)
    tables += [index for work in passes.works for index in (work.row_index, work.col_index) if index is not None]
    factored = state("exp_avg_sq_row", "exp_avg_sq_col")
    assert factored == plan.moments.values.nbytes
    return Share(
        averages=state("z", "exp_avg"),
        second_moments=state("exp_avg_sq"),
        samples=state("p0", "s"),
        factored=factored,
        numbers=size([plan.parameters, *tables_of_sums, sums.sums, optimizer._engine.numbers.values]),
        indices=size(tables),
    )


def real(strategy: str, names: list[str], dtype: torch.dtype) -> list[tuple[Share, list[int], int]]:
    """What this rank holds after two steps under each switch, and the sizes and the number of its reductions."""
    results = []
    shape = MESHES.get(strategy)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "cut")[-len(shape) :]) if shape else None
    for name in names:
        model = make_model(dtype)
        if mesh is not None:
            fully_shard(model, mesh=mesh)
        forward = DistributedDataParallel(model) if strategy == "ddp" else model
        optimizer = build(name, model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            forward(torch.randn(5, 33, dtype=dtype)).float().square().mean().backward()
            with count_collectives() as collectives:
                optimizer.step()
        assert set(collectives.names) <= {"allreduce_"}
        results.append((held(model, optimizer), collectives.sizes, collectives.total))
    return results


def expected(strategy: str, name: str, dtype: torch.dtype, world_size: int = RANKS) -> Any:
    model = make_model(dtype)
    optimizer = build(name, model.parameters())
    shapes = [(tuple(p.shape), p.dtype) for p in model.parameters()]
    shards = 2 if strategy == "hsdp" else None
    return forecast(shapes, switches_of(optimizer), strategy, world_size, shards, method=optimizer.method)


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "hsdp"])
def test_every_number_is_that_of_a_real_run(strategy: str, dtype: torch.dtype) -> None:
    ranks = 1 if strategy == "single" else RANKS
    names = [*CHOSEN, *SISTERS] if dtype == torch.float32 else ["default", "low_factors", "no_quirks", "speed"]
    by_rank = run(ranks, real, strategy, names, dtype)
    for index, name in enumerate(names):
        foreseen = expected(strategy, name, dtype)
        assert len(foreseen.shares) == ranks
        for rank in range(ranks):
            share, sizes, count = by_rank[rank][index]
            assert share == foreseen.shares[rank], (name, rank)
            assert (count, tuple(sizes)) == (len(foreseen.reductions), foreseen.reductions), (name, rank)
        assert foreseen.total.elements == sum(by_rank[rank][index][0].elements for rank in range(ranks))


def test_seventy_billion_parameters_on_a_thousand_ranks_take_no_time() -> None:
    shapes = [((8192, 8192), torch.float32), ((28672, 8192), torch.float32), ((8192, 28672), torch.float32)] * 128
    began = time.process_time()
    switches = switches_of(ProdigyPlusScheduleFree([torch.zeros(1, requires_grad=True)]))
    foreseen = forecast(shapes, switches, "fsdp", 1000)
    assert time.process_time() - began < 5
    assert foreseen.total.elements == 128 * (8192 * 8192 + 2 * 28672 * 8192)
    # 8192 rows in pieces of 9 and 28672 in pieces of 29 leave the last rank with none.
    assert foreseen.shares[-1] == replace(
        foreseen.shares[-1], elements=0, weights=0, gradients=0, averages=0, samples=0, second_moments=0
    )
    assert foreseen.shares[0].elements == 128 * (9 * 8192 + 29 * 8192 + 9 * 28672)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zero9", 2), "strategy='zero9' cannot be forecast: allowed are single, ddp, fsdp, hsdp, zero1"),
        (("fsdp", 0), "world_size=0 is too small"),
        (("hsdp", 4), "shards=None must divide world_size=4"),
        (("hsdp", 4, 3), "shards=3 must divide world_size=4"),
    ],
)
def test_what_cannot_be_forecast_is_named(arguments: tuple[Any, ...], message: str) -> None:
    switches = switches_of(ProdigyPlusScheduleFree([torch.zeros(1, requires_grad=True)]))
    with pytest.raises(ValueError, match=message):
        forecast([((4, 4), torch.float32)], switches, *arguments)


def test_a_parameter_without_rows_cannot_be_cut() -> None:
    switches = switches_of(ProdigyPlusScheduleFree([torch.zeros(1, requires_grad=True)]))
    with pytest.raises(ValueError, match="without dimensions"):
        forecast([((), torch.float32)], switches, "fsdp", 2)


@pytest.mark.launch
def test_the_command_line_starts_no_rank() -> None:
    train = str(launchers.ROOT / "launch/train.py")
    outcome = launchers.run([sys.executable, train, *"--dry-run --world-size 4 --shards 2 --dim 64 --layers 2".split()])
    assert outcome.code == 0, outcome.text
    # 12 dim^2 + 9 dim in a block (two biases, two LayerNorms), 256 + 128 embeddings, one LayerNorm.
    count = 2 * (12 * 64**2 + 9 * 64) + (256 + 128) * 64 + 2 * 64
    assert f"{count:,} parameters in {2 * 10 + 4} tensors, float32; 4 ranks" in outcome.text
    lines = outcome.text.splitlines()
    for name, first, total in (
        ("ddp", count, 4 * count),
        ("fsdp", count // 4, count),
        ("hsdp 2x2", count // 2, 2 * count),
    ):
        (start,) = [index for index, line in enumerate(lines) if line.strip().startswith(f"{name} ")]
        assert lines[start + 1].split()[2] == f"{first:,}"
        everyone = next(line for line in lines[start:] if line.strip().startswith("all ranks"))
        assert everyone.split()[2] == f"{total:,}"
