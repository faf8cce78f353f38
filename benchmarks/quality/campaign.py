"""Which trainings the tables need, and the folder that holds one JSON for each: what is there is not run again."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.quality.rivals import RIVALS
from benchmarks.quality.training import Run, train
from benchmarks.quality.workloads import FIRST_SEED, WORKLOADS

Record = dict[str, Any]

FIRST_GRID = (0.5, 1.0, 2.0)
"""Times the learning rate of the workload. A grid grows by twos until its best has a neighbour on each side."""
LARGEST_GRID = 14
SEEDS = range(FIRST_SEED, FIRST_SEED + 5)


class Campaign:
    """The records of a folder.

    Args:
        folder: that holds them, or a file that ``gather`` has written, from which nothing can be run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[Run, Record] = {}
        texts = folder.read_text().splitlines() if folder.is_file() else _texts(folder)
        for record in map(json.loads, texts):
            self.records[Run(record["workload"], record["rival"], record["lr"], record["seed"])] = record

    def loss(self, run: Run) -> float:
        """What counts at the end of a run, inf where it was not finite."""
        loss = self.records[run]["loss"]
        return float("inf") if loss is None else loss

    def losses(self, workload: str, rival: str, lr: float, seeds: int) -> list[float]:
        """Of the first seeds, or nothing as long as one is missing."""
        runs = [Run(workload, rival, lr, seed) for seed in SEEDS[:seeds]]
        return [self.loss(run) for run in runs] if all(run in self.records for run in runs) else []

    def grid(self, workload: str, rival: str, seeds: int) -> list[float]:
        """The learning rates of a rival that has to be tuned, with those that are wanted next."""
        grid = [WORKLOADS[workload].lr * factor for factor in FIRST_GRID]
        while len(grid) < LARGEST_GRID:
            found = [self.losses(workload, rival, lr, seeds) for lr in grid]
            if not all(found):
                break
            means = [statistics.fmean(losses) for losses in found]
            best = means.index(min(means))
            if 0 < best < len(grid) - 1:
                break
            grid = [grid[0] / 2, *grid] if best == 0 else [*grid, grid[-1] * 2]
        return grid

    def wanted(
        self, workloads: Iterable[str], rivals: Iterable[str], seeds: int, multiplied: bool = False
    ) -> Iterator[Run]:
        """Runs that are not here yet. When they are, a grid may want more.

        Args:
            workloads, rivals: names.
            seeds: how many.
            multiplied: also what rivals without a grid do with their step sizes multiplied.
        """
        for seed in SEEDS[:seeds]:
            for workload in workloads:
                for rival in rivals:
                    one = RIVALS[rival]
                    untuned = one.multipliers if multiplied else (1.0,)
                    for lr in self.grid(workload, rival, seeds) if one.grid else untuned:
                        if (run := Run(workload, rival, lr, seed)) not in self.records:
                            yield run

    def run(self, wanted: Callable[[], Iterable[Run]], jobs: int, told: Callable[[Run], None]) -> None:
        """Runs everything that is wanted, a few at a time, each in one thread of a process that is used again.

        Args:
            wanted: says what is; it is asked again when all of that is done.
            jobs: trainings at the same time.
            told: called with each run when its record is kept.
        """
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            while runs := {pool.submit(train, run): run for run in wanted()}:
                for done in as_completed(runs):
                    self.keep(runs[done], done.result())
                    told(runs[done])

    def gather(self, file: Path) -> None:
        """Write all records into one file, a line for each, without what only this machine says."""
        kept = ({k: v for k, v in self.records[run].items() if k != "seconds"} for run in sorted(self.records))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def keep(self, run: Run, record: Record) -> None:
        """Write the record of a run, whole or not at all."""
        path = self.folder / f"{run.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(record) + "\n")
        unfinished.rename(path)
        self.records[run] = record


def _texts(folder: Path) -> Iterator[str]:
    return (path.read_text() for path in sorted(folder.glob("*/*.json")))
