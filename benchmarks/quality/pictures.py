"""What the records look like: loss against the learning rate, over the steps, and the step size that was found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.campaign import SEEDS
from benchmarks.quality.rivals import ADAMW, DEFAULT, RECOMMENDED, RIVALS, SCHEDULEFREE
from benchmarks.quality.tables import Results
from benchmarks.quality.training import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
COLOURS = {ADAMW: "#444444", SCHEDULEFREE: "#d58a2b", DEFAULT: "#7fb2dd", RECOMMENDED: "#1f5fa6",
           "prodigy": "#7a4fa3"}  # fmt: skip
HIGHEST_REGRET = 60.0
"""Percent. Above, a curve leaves the picture: what is worse than that is simply worse."""
SMALLEST_SCALE = 5.0
"""Percent. Less fills no picture."""


def sensitivity(results: Results, path: Path) -> None:
    """How much worse than the best tuned AdamW, against the multiplier of AdamW's best learning rate."""

    def draw(axes: Axes, name: str) -> None:
        for rival in (ADAMW, SCHEDULEFREE):
            if not results.curve(name, rival):
                continue
            best = results.best_lr(name, rival)
            curve = {lr / best: results.regret(name, s) for lr, s in results.curve(name, rival).items()}
            _band(axes, list(curve), [[100 * value for value in s.values] for s in curve.values()], rival)
        for rival in (DEFAULT, RECOMMENDED):
            if sample := results.at(name, rival):
                values = [100 * value for value in results.regret(name, sample).values]
                axes.axhspan(min(values), max(values), color=COLOURS[rival], alpha=0.25, linewidth=0)
                axes.axhline(statistics.fmean(values), color=COLOURS[rival], label=RIVALS[rival].title, linewidth=2)
        axes.set_xscale("log", base=2)
        lowest, highest = axes.get_ylim()
        axes.set_ylim(max(lowest, -HIGHEST_REGRET), min(max(highest, SMALLEST_SCALE), HIGHEST_REGRET))

    _panels(results, path, draw, "learning rate, times the best of each", "percent worse than the best tuned AdamW")


def losses(results: Results, path: Path) -> None:
    """The loss over the steps, mean of the seeds, tuned rivals at their best."""

    def draw(axes: Axes, name: str) -> None:
        for rival in (ADAMW, SCHEDULEFREE, "prodigy", DEFAULT, RECOMMENDED):
            if records := _records(results, name, rival):
                means = _mean(records, "losses")
                title = RIVALS[rival].title
                axes.plot(records[0]["steps"][: len(means)], means, color=COLOURS[rival], label=title)
        axes.set_yscale("log")

    _panels(results, path, draw, "step", "what counts, log scale")


def sizes(results: Results, path: Path) -> None:
    """The step size that was found over the steps, each seed, beside the learning rates that AdamW bears."""

    def draw(axes: Axes, name: str) -> None:
        best = results.best_lr(name, ADAMW)
        axes.axhline(best, color=COLOURS[ADAMW], linestyle="--", label="best learning rate of AdamW")
        for rival in (DEFAULT, RECOMMENDED, "prodigy"):
            for number, record in enumerate(_records(results, name, rival)):
                label = f"d of {RIVALS[rival].title}" if number == 0 else None
                axes.plot(record["steps"], record["sizes"], color=COLOURS[rival], label=label, linewidth=1)
        axes.set_yscale("log")

    _panels(results, path, draw, "step", "step size, log scale")


def _records(results: Results, workload: str, rival: str) -> list[dict[str, Any]]:
    curve = results.curve(workload, rival)
    lr = results.best_lr(workload, rival) if RIVALS[rival].grid and curve else 1.0
    return (
        [results.campaign.records[Run(workload, rival, lr, seed)] for seed in SEEDS[: results.seeds]]
        if lr in curve
        else []
    )


def _mean(records: Sequence[dict[str, Any]], what: str) -> list[float]:
    rows = zip(*(record[what] for record in records), strict=False)
    return [statistics.fmean(math.nan if value is None else value for value in row) for row in rows]


def _band(axes: Axes, places: list[float], values: list[list[float]], rival: str) -> None:
    axes.plot(
        places,
        [statistics.fmean(v) for v in values],
        "o-",
        markersize=3,
        color=COLOURS[rival],
        label=RIVALS[rival].title,
    )
    axes.fill_between(
        places, [min(v) for v in values], [max(v) for v in values], color=COLOURS[rival], alpha=0.15, linewidth=0
    )


def _panels(results: Results, path: Path, draw: Callable[[Axes, str], None], x: str, y: str) -> None:
    from matplotlib.figure import Figure

    names = results.workloads()
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(11, 2.7 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    places = list(grid.flat)
    for axes, name in zip(places, names, strict=False):
        draw(axes, name)
        axes.set_title(name, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(names) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in places[: len(names)]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
