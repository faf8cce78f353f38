"""What a rank of ``benchmarks.scaling`` does, in a module that it can import."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.engine import reductions
from tests.harness.counting import count_collectives


@dataclass(frozen=True)
class Point:
    """Medians over the steps of one rank.

    Attributes:
        step, reductions: seconds, the second a part of the first.
        collectives, collective_bytes: of one step.
    """

    step: float
    reductions: float
    collectives: int
    collective_bytes: int


def measure(matrices: int, size: int, steps: int, portions: int, worth: int) -> Point:
    """On one rank of a pool, with sums of g^2 that travel in at most so many portions, of at least so many each."""
    reductions.MOST_PORTIONS, reductions.OF_A_PORTION = portions, worth
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(matrices):
        whole = torch.randn(size, size, generator=generator).mul_(0.02)
        parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(whole * 0.1, mesh, [Shard(0)])
        parameters.append(parameter)
    optimizer = ProdigyPlusScheduleFree(parameters)
    optimizer.step()
    (plan,) = optimizer._engine.plans.values()
    spent = [0.0]
    reduce = plan.reductions.reduce

    def timed() -> None:
        begin = time.perf_counter()
        reduce()
        spent[0] += time.perf_counter() - begin

    plan.reductions.reduce = timed  # type: ignore[method-assign]
    with count_collectives() as collectives:
        optimizer.step()
    of_steps, of_reductions = [], []
    for _ in range(steps):
        torch.distributed.barrier()
        spent[0], begin = 0.0, time.perf_counter()
        optimizer.step()
        of_steps.append(time.perf_counter() - begin)
        of_reductions.append(spent[0])
    return Point(
        statistics.median(of_steps), statistics.median(of_reductions), collectives.total, sum(collectives.sizes)
    )
