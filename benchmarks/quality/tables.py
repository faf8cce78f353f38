"""What the records say: losses, and the price of not tuning, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.quality.campaign import SEEDS, Campaign
from benchmarks.quality.rivals import ADAMW, RIVALS
from benchmarks.quality.training import Run
from benchmarks.quality.workloads import WORKLOADS


@dataclass(frozen=True)
class Sample:
    """The losses of some seeds.

    Attributes:
        values: one for each seed; inf where a training did not end with a finite loss.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 and math.isfinite(self.mean) else math.nan

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.spread:.4f}" if math.isfinite(self.mean) else "diverges"


class Results:
    """What the tables and the pictures read.

    Args:
        campaign: with its records.
        seeds: how many count.
    """

    def __init__(self, campaign: Campaign, seeds: int) -> None:
        self.campaign, self.seeds = campaign, seeds

    def workloads(self) -> list[str]:
        """Those for which the yardstick, AdamW over its grid, is complete."""
        return [name for name in WORKLOADS if self.curve(name, ADAMW)]

    def rivals(self) -> list[str]:
        """Those with something to show."""
        return [rival for rival in RIVALS if any(self.curve(name, rival) for name in self.workloads())]

    def curve(self, workload: str, rival: str) -> dict[float, Sample]:
        """The losses at each learning rate or multiplier that has all seeds, in rising order."""
        tried = sorted({run.lr for run in self.campaign.records if run[:2] == (workload, rival)})
        found = ((lr, self.campaign.losses(workload, rival, lr, self.seeds)) for lr in tried)
        return {lr: Sample(tuple(losses)) for lr, losses in found if losses}

    def best_lr(self, workload: str, rival: str) -> float:
        """Where the mean over the seeds is least."""
        curve = self.curve(workload, rival)
        return min(curve, key=lambda lr: curve[lr].mean)

    def at(self, workload: str, rival: str) -> Sample | None:
        """At its best learning rate, or untuned where it needs none."""
        curve = self.curve(workload, rival)
        lr = 1.0 if not RIVALS[rival].grid else min(curve, key=lambda lr: curve[lr].mean, default=math.nan)
        return curve.get(lr)

    def regret(self, workload: str, sample: Sample) -> Sample:
        """How much worse than the best tuned AdamW, as a part of its mean loss, seed by seed."""
        best = self.curve(workload, ADAMW)[self.best_lr(workload, ADAMW)].mean
        return Sample(tuple(value / best - 1 for value in sample.values))

    def off_by_one(self, workload: str, rival: str) -> Sample | None:
        """The neighbours of the best learning rate, both of them."""
        curve = self.curve(workload, rival)
        if not curve:
            return None
        ordered, best = list(curve), self.best_lr(workload, rival)
        place = ordered.index(best)
        beside = [lr for lr in ordered[max(0, place - 1) : place + 2] if lr != best]
        return Sample(tuple(value for lr in beside for value in curve[lr].values))

    def everywhere(self, rival: str) -> tuple[float, dict[str, Sample]] | None:
        """The one learning rate, of those tried on every workload, whose mean regret over them is least."""
        names = self.workloads()
        curves = {name: self.curve(name, rival) for name in names}
        shared = set.intersection(*(set(curve) for curve in curves.values())) if curves else set()
        regrets = {lr: {name: self.regret(name, curves[name][lr]) for name in names} for lr in sorted(shared)}
        if not regrets:
            return None
        lr = min(regrets, key=lambda lr: statistics.fmean(sample.mean for sample in regrets[lr].values()))
        return lr, regrets[lr]


def losses(results: Results) -> str:
    """The loss of each rival on each workload, one line for each workload."""
    rivals = results.rivals()
    lines = [_row(["workload", *(RIVALS[rival].title for rival in rivals)]), _row(["---"] * (len(rivals) + 1))]
    for name in results.workloads():
        lines.append(_row([f"`{name}`", *(str(results.at(name, rival) or "") for rival in rivals)]))
    return "\n".join(lines)


def regrets(results: Results) -> str:
    """How much worse than the best tuned AdamW each is, in percent, one line for each rival, the best mean first."""
    rows: list[tuple[str, dict[str, Sample]]] = []
    for rival in results.rivals():
        title = RIVALS[rival].title
        if not RIVALS[rival].grid:
            rows.append((title, _regrets(results, rival, results.at)))
            continue
        rows.append((f"{title}, tuned for each", _regrets(results, rival, results.at)))
        rows.append((f"{title}, one grid step off", _regrets(results, rival, results.off_by_one)))
        if found := results.everywhere(rival):
            rows.append((f"{title}, lr {found[0]:g} everywhere", found[1]))
    names = results.workloads()
    complete = [(title, row, _mean(row.values())) for title, row in rows if set(row) == set(names)]
    complete.sort(key=lambda row: row[2])
    lines = [_row(["", "mean", "worst", *(f"`{name}`" for name in names)]), _row(["---"] * (len(names) + 3))]
    for title, row, mean in complete:
        worst = max(sample.mean for sample in row.values())
        lines.append(
            _row([title, _percent(mean), _percent(worst), *(_percent(row[n].mean, row[n].spread) for n in names)])
        )
    return "\n".join(lines)


def targets(results: Results) -> str:
    """Steps until the share of right answers reached the target, where there is one: the median over the seeds."""
    lines = []
    for name in results.workloads():
        workload = WORKLOADS[name]
        if not workload.target:
            continue
        lines += [_row([f"`{name}`", f"steps to {workload.target:.0%}, of {workload.steps}", "seeds that got there"])]
        lines += [_row(["---"] * 3)]
        for rival in results.rivals():
            lr = results.best_lr(name, rival) if RIVALS[rival].grid else 1.0
            runs = [results.campaign.records.get(Run(name, rival, lr, seed)) for seed in SEEDS[: results.seeds]]
            steps = [_first(record, workload.target) for record in runs if record]
            reached = [step for step in steps if math.isfinite(step)]
            median = statistics.median(steps) if steps else math.inf
            shown = f"{median:.0f}" if math.isfinite(median) else "never"
            lines.append(_row([RIVALS[rival].title, shown, f"{len(reached)} of {len(steps)}"]))
    return "\n".join(lines)


def grids(results: Results) -> str:
    """Where each grid ends and where its best lies."""
    tuned = [rival for rival in results.rivals() if RIVALS[rival].grid]
    lines = [
        _row(["workload", *(f"{RIVALS[rival].title}: best of" for rival in tuned)]),
        _row(["---"] * (len(tuned) + 1)),
    ]
    for name in results.workloads():
        cells = []
        for rival in tuned:
            tried = list(results.curve(name, rival))
            cells.append(f"{results.best_lr(name, rival):g} of {tried[0]:g} to {tried[-1]:g}" if tried else "")
        lines.append(_row([f"`{name}`", *cells]))
    return "\n".join(lines)


def _regrets(results: Results, rival: str, of: object) -> dict[str, Sample]:
    assert callable(of)
    found = {name: of(name, rival) for name in results.workloads()}
    return {name: results.regret(name, sample) for name, sample in found.items() if sample}


def _mean(samples: Iterable[Sample]) -> float:
    return statistics.fmean(sample.mean for sample in samples)


def _first(record: dict[str, object], target: float) -> float:
    steps, right = record["steps"], record["right"]
    assert isinstance(steps, list) and isinstance(right, list)
    return next(
        (step for step, share in zip(steps, right, strict=True) if share is not None and share >= target), math.inf
    )


def _percent(value: float, spread: float | None = None) -> str:
    if not math.isfinite(value):
        return "diverges"
    beside = f" ± {100 * spread:.1f}" if spread is not None and math.isfinite(spread) else ""
    return f"{100 * value:+.1f}{beside}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
