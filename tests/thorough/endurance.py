"""Many steps, and what grows meanwhile."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import NamedShapes, initial_weights
from tests.runs import Run, make_optimizer
from tests.thorough.cases import local

SHAPES: NamedShapes = [("factored", (33, 34)), ("zero_small", (5, 3)), ("vector", (13,))]
CURVATURE, NOISE = 0.1, 0.01
"""Of the quadratic that each element goes down. Given gradients, which know no weights, let d grow without end."""

READINGS = 20
"""How often memory, process groups and d are read on the way."""


@dataclass
class Long:
    """What a long run leaves. ``memory`` is what is resident, in bytes; ``handles`` are open files and sockets."""

    run: Run
    memory: list[int] = field(default_factory=list)
    process_groups: list[int] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def many_steps(layout: str, steps: int) -> Long:
    """Steps on a quadratic with noise, whose target the weights reach early on."""
    start = initial_weights(SHAPES)
    parameters = shard_parameters(start, LAYOUTS[layout])
    optimizer = make_optimizer(parameters, 2)
    long = Long(Run(start, {}, {}))
    targets, generator = initial_weights(SHAPES, seed=1), torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        pull = {
            name: NOISE * torch.randn(target.shape, generator=generator) - CURVATURE * target
            for name, target in targets.items()
        }
        set_grads(parameters, pull)
        for parameter in parameters.values():
            local(parameter.grad).add_(local(parameter.detach()), alpha=CURVATURE)
        optimizer.step()
        if step % max(1, steps // READINGS) == 0:
            optimizer.get_d()
            long.run.groups.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
            long.memory.append(resident())
            long.process_groups.append(dist.get_pg_count() if dist.is_initialized() else 0)
            long.handles.append(len(list(Path("/proc/self/fd").iterdir())))
            long.threads.append(len(list(Path("/proc/self/task").iterdir())))
    long.run.weights = gather(parameters)
    return long
