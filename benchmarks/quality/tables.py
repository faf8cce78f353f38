"""What the records say: losses, and the price of not tuning, as Markdown."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.campaign import SEEDS, Campaign
from benchmarks.quality.rivals import ADAMW, MAIN, MULTIPLIERS, RECOMMENDED, RIVALS, VARIANTS
from benchmarks.quality.training import Run
from benchmarks.quality.workloads import WORKLOADS

_PLACE = re.compile(r"<!-- table: (\w+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


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


def everything(results: Results) -> dict[str, str]:
    """All tables by the names that a page has for them."""
    return {
        "regret": regrets(results, MAIN),
        "losses": losses(results, MAIN),
        "variants": regrets(results, VARIANTS),
        "multiplied": multiplied(results),
        "targets": targets(results),
        "grids": grids(results),
    }


def put(page: str, made: Mapping[str, str]) -> str:
    """The page with each table between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page names no table, or one that there is not.
    """
    names = _PLACE.findall(page)
    if not names or not set(names) <= set(made):
        raise ValueError(f"the page names the tables {names}: allowed are {', '.join(made)}, at least one")
    return _PLACE.sub(lambda match: f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->", page)


def losses(results: Results, rivals: Sequence[str]) -> str:
    """The loss of each rival on each workload, one line for each workload."""
    shown = [rival for rival in rivals if rival in results.rivals()]
    lines = [_row(["workload", *(RIVALS[rival].title for rival in shown)]), _row(["---"] * (len(shown) + 1))]
    for name in results.workloads():
        lines.append(_row([f"`{name}`", *(str(results.at(name, rival) or "") for rival in shown)]))
    return "\n".join(lines)


def regrets(results: Results, rivals: Sequence[str]) -> str:
    """How much worse than the best tuned AdamW each is, in percent, one line for each rival, the best mean first.

    Only the workloads that all of these rivals have been run on.
    """
    rows: list[tuple[str, dict[str, Sample]]] = []
    shown = [rival for rival in rivals if rival in results.rivals()]
    names = [name for name in results.workloads() if all(results.at(name, rival) for rival in shown)]
    for rival in shown:
        title = RIVALS[rival].title
        if not RIVALS[rival].grid:
            rows.append((title, _regrets(results, names, rival, results.at)))
            continue
        rows.append((f"{title}, tuned for each", _regrets(results, names, rival, results.at)))
        rows.append((f"{title}, one grid step off", _regrets(results, names, rival, results.off_by_one)))
    rows.sort(key=lambda row: _mean(row[1].values()))
    lines = [_row(["", "mean", "median", "worst", *(f"`{name}`" for name in names)]), _row(["---"] * (len(names) + 4))]
    for title, row in rows:
        means = [sample.mean for sample in row.values()]
        summary = [_percent(of(means)) for of in (statistics.fmean, statistics.median, max)]
        lines.append(_row([title, *summary, *(_percent(row[name].mean, row[name].spread) for name in names)]))
    return "\n".join(lines)


def multiplied(results: Results) -> str:
    """What becomes of the recommended setting where the step size that it finds is halved and doubled, in percent."""
    names = [name for name in results.workloads() if len(results.curve(name, RECOMMENDED)) == len(MULTIPLIERS)]
    lines = [_row(["d times", "mean", *(f"`{name}`" for name in names)]), _row(["---"] * (len(names) + 2))]
    for multiplier in MULTIPLIERS if names else ():
        row = [results.regret(name, results.curve(name, RECOMMENDED)[multiplier]) for name in names]
        cells = [_percent(sample.mean, sample.spread) for sample in row]
        lines.append(_row([f"{multiplier:g}", _percent(_mean(row)), *cells]))
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
        for rival in (rival for rival in MAIN if results.curve(name, rival)):
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


def _regrets(
    results: Results, names: Sequence[str], rival: str, of: Callable[[str, str], Sample | None]
) -> dict[str, Sample]:
    found = {name: of(name, rival) for name in names}
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
