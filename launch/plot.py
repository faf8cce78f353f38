"""Draws loss and d over the steps of a run. On its own: python launch/plot.py FOLDER."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optimizers import CONSTANT
from records import Number, RunFolder

SIZE_INCHES = (9.0, 7.0)
DOTS_PER_INCH = 120
TRAIN_COLOUR, VALIDATION_COLOUR, UNIGRAM_COLOUR, D_COLOUR = "#4c78a8", "#d1495b", "#555555", "#2a7f62"
# Runs that were recorded before there was a choice.
DEFAULT_OPTIMIZER = "ProdigyPlusScheduleFree"
# The thick training line is a mean over this part of the run, so that a long run is as readable as a short one.
SMOOTHED_PART = 0.02
# The last values are written right of the lines, in this part of their width.
ROOM_FOR_TEXT = 0.12


def draw(folder: RunFolder) -> None:
    """Writes the picture of a run from its metrics and description."""
    rows, about = folder.rows(), folder.description()
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle("Language model on the bytes of Python's standard library", fontsize=14)
    _loss(top, rows, about)
    _step_size(bottom, rows, about)
    bottom.set_xlim(0, (1 + ROOM_FOR_TEXT) * max(_series(rows, "loss")[0], default=1))
    figure.align_ylabels()
    figure.savefig(folder.picture, dpi=DOTS_PER_INCH)


def _loss(axes: Axes, rows: list[dict[str, Number]], about: dict[str, object]) -> None:
    steps, losses = _series(rows, "loss")
    axes.plot(steps, losses, color=TRAIN_COLOUR, linewidth=0.8, alpha=0.35)
    axes.plot(
        steps, _smoothed(losses), color=TRAIN_COLOUR, linewidth=1.8, label="training batches and their running mean"
    )
    checked, validation = _series(rows, "val_loss")
    weights = "averaged weights" if about.get("averages", True) else "weights of the step"
    axes.plot(checked, validation, "o-", color=VALIDATION_COLOUR, markersize=4, label=f"validation, {weights}")
    entropy = about["unigram_entropy"]
    assert isinstance(entropy, float)
    axes.axhline(entropy, color=UNIGRAM_COLOUR, linestyle="--", label=f"unigram entropy ({entropy:.2f})")
    if checked:
        _name_last(axes, checked[-1], validation[-1], f"{validation[-1]:.2f}", VALIDATION_COLOUR)
    ranks = "1 process" if about["ranks"] == 1 else f"{about['ranks']} ranks, {about['strategy']}"
    axes.set_title(f"Loss ({about['parameters']:,} parameters, {ranks})", fontsize=11)
    axes.set_ylabel("nats per byte")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def _step_size(axes: Axes, rows: list[dict[str, Number]], about: dict[str, object]) -> None:
    """The step size d over the steps, or the learning rate where the optimizer finds no d."""
    finds_d = any("d" in row for row in rows)
    steps, sizes = _series(rows, "d" if finds_d else "lr")
    axes.plot(steps, sizes, color=D_COLOUR, linewidth=2.0)
    axes.set_yscale("log" if finds_d else "linear")
    if steps:
        _name_last(axes, steps[-1], sizes[-1], f"{sizes[-1]:.1e}", D_COLOUR)
    optimizer, schedule = about.get("optimizer", DEFAULT_OPTIMIZER), about.get("schedule", CONSTANT)
    times = "no schedule" if schedule == CONSTANT else f"times a {schedule}"
    what = (
        f"Step size d, found by {optimizer} (no learning rate, {times})" if finds_d else f"Learning rate of {optimizer}"
    )
    axes.set_title(what, fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("d, log scale" if finds_d else "learning rate")
    axes.grid(alpha=0.3)


def _name_last(axes: Axes, step: float, value: float, text: str, colour: str) -> None:
    axes.annotate(
        text,
        (step, value),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontweight="bold",
    )


def _series(rows: list[dict[str, Number]], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row.get(name)) for row in rows]
    finite = [(float(step), float(value)) for step, value in points if step is not None and value is not None]
    return [step for step, _ in finite], [value for _, value in finite]


def _smoothed(values: list[float]) -> list[float]:
    reach = math.ceil(SMOOTHED_PART * len(values) / 2)
    around = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(some) / len(some) for some in around]


if __name__ == "__main__":
    draw(RunFolder(Path(sys.argv[1])))
