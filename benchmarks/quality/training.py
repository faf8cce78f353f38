"""One training: a workload, a rival, a learning rate, a seed."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from benchmarks.quality.rivals import RIVALS, Trainer
from benchmarks.quality.workloads import WORKLOADS, Task

EVALUATIONS = 10
"""In each training, evenly spaced, the last one at its end."""


class Run(NamedTuple):
    """What says everything about a training.

    Attributes:
        workload, rival: their names.
        lr: learning rate, or what multiplies the one that is found.
        seed: of weights and data.
    """

    workload: str
    rival: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """A name for a file."""
        return f"{self.workload}/{self.rival}-{self.lr:.4g}-{self.seed}"


def train(run: Run) -> dict[str, Any]:
    """Trains and returns the record: what was run, losses over the steps and the last one, sizes of steps.

    Losses that are not finite are None, and end the training.
    """
    torch.set_num_threads(1)
    workload, rival = WORKLOADS[run.workload], RIVALS[run.rival]
    began = time.perf_counter()
    task = workload.task(run.seed)
    trainer = rival.make(task.model, run.lr)
    record: dict[str, Any] = {**run._asdict(), "steps": [], "losses": [], "right": [], "training": [], "sizes": []}
    since: list[torch.Tensor] = []
    for step in range(1, workload.steps + 1):
        since.append(_step(task, trainer, step, rival.factor(step, workload.steps)))
        if step * EVALUATIONS // workload.steps > (step - 1) * EVALUATIONS // workload.steps:
            with trainer.averaged():
                loss, right = task.evaluate()
            record["steps"].append(step)
            record["losses"].append(_finite(loss))
            record["right"].append(_finite(right))
            record["training"].append(_finite(float(torch.stack(since).mean())))
            record["sizes"].append(_finite(next(iter(trainer.sizes().values()))))
            since = []
            if not math.isfinite(loss):
                break
    return {**record, "loss": record["losses"][-1], "seconds": round(time.perf_counter() - began, 2)}


def _step(task: Task, trainer: Trainer, step: int, factor: float) -> torch.Tensor:
    loss = task.loss(step)
    task.model.zero_grad()
    loss.backward()
    trainer.step(loss.detach(), factor)
    return loss.detach()


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
