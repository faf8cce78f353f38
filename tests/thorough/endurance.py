"""Many steps, and what grows meanwhile."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import NamedShapes, initial_weights
from tests.runs import Run, make_optimizer
from tests.thorough.cases import local

SHAPES: NamedShapes = [("factored", (33, 34)), ("zero_small", (5, 3)), ("vector", (13,))]
CURVATURE, NOISE = 0.1, 0.01
"""Of the quadratic that each element goes down. Given gradients, which know no weights, let d grow without end."""


@dataclass
class Reading:
    """What one rank is after a stretch of steps.

    ``grown`` are bytes that the stretch has added to what is resident; ``handles`` are open files and sockets.
    """

    run: Run
    grown: int
    process_groups: int
    handles: int
    threads: int


@dataclass
class Problem:
    """Parameters that go down a quadratic with noise, whose target they reach early on."""

    layout: str
    start: dict[str, Tensor] = field(init=False)
    parameters: dict[str, Any] = field(init=False)
    model: nn.Module = field(init=False)
    optimizer: ProdigyPlusScheduleFree = field(init=False)

    def __post_init__(self) -> None:
        self.start = initial_weights(SHAPES)
        self.parameters = shard_parameters(self.start, LAYOUTS[self.layout])
        self.model = nn.Module()
        self.model.weights = nn.ParameterDict(self.parameters)
        self.optimizer = make_optimizer(self.parameters, 2)

    def stretch(self, number: int, steps: int) -> Run:
        """Go on for some steps; the noise belongs to the number of the stretch."""
        targets, generator = initial_weights(SHAPES, seed=1), torch.Generator().manual_seed(number)
        for _ in range(steps):
            pull = {
                name: NOISE * torch.randn(target.shape, generator=generator) - CURVATURE * target
                for name, target in targets.items()
            }
            set_grads(self.parameters, pull)
            for parameter in self.parameters.values():
                local(parameter.grad).add_(local(parameter.detach()), alpha=CURVATURE)
            self.optimizer.step()
        self.optimizer.get_d()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return Run(self.start, gather(self.parameters), {}, [groups])


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def many_steps(layout: str, stretches: int, steps: int, folder: Path) -> list[Reading]:
    """One run, which leaves a checkpoint after each stretch of steps."""
    problem = Problem(layout)
    readings = []
    for number in range(stretches):
        before = resident()
        run = problem.stretch(number, steps)
        readings.append(
            Reading(
                run,
                grown=resident() - before,
                process_groups=dist.get_pg_count() if dist.is_initialized() else 0,
                handles=len(list(Path("/proc/self/fd").iterdir())),
                threads=len(list(Path("/proc/self/task").iterdir())),
            )
        )
        save_checkpoint(folder / str(number), problem.model, problem.optimizer)
    return readings


def same_steps_alone(stretches: int, steps: int, folder: Path) -> list[Run]:
    """Each stretch in one process, from the checkpoint that the many ranks had left before it."""
    runs = []
    for number in range(stretches):
        problem = Problem("single")
        if number:
            load_checkpoint(folder / str(number - 1), problem.model, problem.optimizer)
        runs.append(problem.stretch(number, steps))
    return runs
