"""Runs that are killed, resumed and moved end as if nothing had been."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.layouts import LAYOUTS
from tests.harness.models import initial_weights
from tests.harness.pool import JobFailed, run
from tests.runs import Run, difference
from tests.thorough.conftest import Amount
from tests.thorough.schedules import Schedule, draw
from tests.thorough.scripts import Outcome, outcome_path, run_sections, started
from tests.thorough.tally import Tally

BATCH = 12
MINUTES = 60
KILLED = ("kill", "crash")
ALLOWED = {"d": 1e-6, "weights": 1e-5}
"""As on the layouts of ``tests/test_layouts.py``."""


@dataclass
class Pending:
    """A schedule that is under way: its next section, and where its files are."""

    schedule: Schedule
    folder: Path
    number: int = 0
    failure: str = ""

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.schedule.sections[self.number].layout].world_size

    @property
    def dies(self) -> bool:
        return self.schedule.sections[self.number].ending in KILLED


@pytest.mark.dist
@pytest.mark.campaign
@pytest.mark.timeout(MINUTES * 60)
def test_schedules(amount: Amount, tally: Tally, tmp_path: Path) -> None:
    """Runs that are killed, resumed and moved between layouts: equal to their uninterrupted twins."""
    schedules = [draw(seed) for seed in range(amount(1_000, 2))]
    runs = [Pending(schedule, tmp_path / str(schedule.seed)) for schedule in schedules]
    twins = [Pending(schedule.twin(), tmp_path / f"twin{schedule.seed}") for schedule in schedules]
    work(runs + twins)
    for ours, twin in zip(runs, twins, strict=True):
        tally.tried += 1
        problem = ours.failure or twin.failure or compare(ours, twin)
        if problem:
            tally.lost.append(f"{ours.schedule}: {problem}")
        for section in ours.schedule.sections[:-1]:
            tally.count({"save": "saves", "kill": "kills in mid-save", "crash": "kills between saves"}[section.ending])
        tally.count("changes of layout", len({section.layout for section in ours.schedule.sections}) - 1)
        shutil.rmtree(ours.folder, ignore_errors=True)
        shutil.rmtree(twin.folder, ignore_errors=True)
    tally.conclude()


def work(everything: list[Pending]) -> None:
    """Run all sections of all schedules, many of different schedules in one job."""
    open_ = list(everything)
    while open_:
        ranks = Counter(pending.ranks for pending in open_).most_common(1)[0][0]
        ready = [pending for pending in open_ if pending.ranks == ranks]
        deadly = [pending for pending in ready if pending.dies][:1]
        batch = [pending for pending in ready if not pending.dies][:BATCH] + deadly
        attempt(ranks, batch)
        open_ = [p for p in open_ if not p.failure and p.number < len(p.schedule.sections)]


def attempt(ranks: int, batch: list[Pending]) -> None:
    """Run one section of each; the last may be one that dies."""
    failure = ""
    try:
        run(ranks, run_sections, [(p.schedule, p.number, p.folder) for p in batch], timeout=MINUTES * 60)
    except JobFailed as failed:
        failure = str(failed)
    for pending in batch:
        finished = outcome_path(pending.folder, pending.number).exists()
        begun = started(pending.folder, pending.number).exists()
        if finished or (begun and pending.dies and "died" in failure and "Traceback" not in failure):
            pending.number += 1
        elif begun:
            pending.failure = failure or "the section left no outcome"


def outcomes(pending: Pending) -> list[Outcome]:
    """Of the sections that were not killed."""
    paths = [outcome_path(pending.folder, number) for number in range(len(pending.schedule.sections))]
    return [pickle.loads(path.read_bytes()) for path in paths if path.exists()]


def compare(ours: Pending, twin: Pending) -> str:
    """What is wrong, or an empty string."""
    parts, (expected,) = outcomes(ours), outcomes(twin)
    last = parts[-1]
    d = {position: values for part in parts for position, values in part.d.items()}
    averages = {position: values for part in parts for position, values in part.averages.items()}
    if ours.schedule.stays:
        return _bitwise(last, expected, d, averages)
    start = initial_weights(list(ours.schedule.shapes), ours.schedule.seed)
    start |= {f"z of {name}": value for name, value in start.items()}
    pairs = [(last.tensors, expected.tensors), *((averages[p], expected.averages[p]) for p in averages)]
    numbers = [[{"d": value} for value in d[position]] for position in d]
    expected_numbers = [[{"d": value} for value in expected.d[position]] for position in d]
    for tensors, expected_tensors in pairs:
        apart = difference(Run({}, tensors, {}, numbers), Run(start, expected_tensors, {}, expected_numbers))
        wide = {name: value for name, value in apart.items() if not value <= ALLOWED[name]}
        if wide:
            return f"apart by {wide}"
    for name in ("k", "skipped_steps", "lr", "weight_decay", "train_mode"):
        if [group[name] for group in last.groups] != [group[name] for group in expected.groups]:
            return f"numbers differ: {_differing(last.groups, expected.groups)}"
    return ""


def _bitwise(
    last: Outcome, expected: Outcome, d: dict[int, list[float]], averages: dict[int, dict[str, torch.Tensor]]
) -> str:
    if last.groups != expected.groups:
        return f"numbers differ: {_differing(last.groups, expected.groups)}"
    if any(values != expected.d[position] for position, values in d.items()):
        return "d differs on the way"
    pairs = [(last.tensors, expected.tensors), *((averages[p], expected.averages[p]) for p in averages)]
    differing = {name for ours, theirs in pairs for name in theirs if not torch.equal(ours[name], theirs[name])}
    return f"bits differ in {sorted(differing)}" if differing else ""


def _differing(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[dict[str, tuple[Any, Any]]]:
    return [
        {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name) or (name in a) != (name in b)}
        for a, b in zip(ours, theirs, strict=True)
    ]
