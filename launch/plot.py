"""Draws loss and step size over the steps of one run, or of several to compare. On its own: see ``--help``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optimizers import CONSTANT
from records import Number, RunFolder

SIZE_INCHES = (9.0, 7.0)
DOTS_PER_INCH = 120
UNIGRAM_COLOUR = "#555555"
COLOURS = ("#4c78a8", "#d1495b", "#2a7f62", "#8a5fb0", "#c77f2a", "#555555")
"""Of the runs, in their order."""
# Runs that were recorded before there was a choice.
DEFAULT_OPTIMIZER = "ProdigyPlusScheduleFree"
# The line of the training loss is a mean over this part of the run, so that a long run is as readable as a short one.
SMOOTHED_PART = 0.02
# The last values are written right of the lines, in this part of their width.
ROOM_FOR_TEXT = 0.14


class Curve(NamedTuple):
    """What is drawn of one run."""

    label: str
    colour: str
    rows: list[dict[str, Number]]
    about: dict[str, object]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a number, where it is finite."""
        points = [(row["step"], row.get(name)) for row in self.rows]
        finite = [(float(step), float(value)) for step, value in points if step is not None and value is not None]
        return [step for step, _ in finite], [value for _, value in finite]


def draw(folders: Sequence[RunFolder], picture: Path) -> None:
    """Writes the picture of some runs from their metrics and descriptions.

    Args:
        folders: of the runs. Of several, each is labelled with the name of its folder.
        picture: file to write.
    """
    many = len(folders) > 1
    curves = [
        Curve(folder.path.name if many else "", COLOURS[i % len(COLOURS)], folder.rows(), folder.description())
        for i, folder in enumerate(folders)
    ]
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle("Language model on the bytes of Python's standard library", fontsize=14)
    _loss(top, curves)
    _step_size(bottom, curves)
    longest = max((max(curve.series("loss")[0], default=1) for curve in curves), default=1)
    bottom.set_xlim(0, (1 + ROOM_FOR_TEXT) * longest)
    figure.align_ylabels()
    figure.savefig(picture, dpi=DOTS_PER_INCH)


def _loss(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        colour, about = curve.colour, curve.about
        before = f"{curve.label}: " if curve.label else ""
        steps, losses = curve.series("loss")
        axes.plot(
            steps, _smoothed(losses), color=colour, linewidth=1.4, alpha=0.5, label=f"{before}training, running mean"
        )
        checked, validation = curve.series("val_loss")
        weights = "averaged weights" if about.get("averages", True) else "weights of the step"
        axes.plot(checked, validation, "o-", color=colour, markersize=4, label=f"{before}validation, {weights}")
    about = curves[0].about
    entropy = about["unigram_entropy"]
    assert isinstance(entropy, float)
    axes.axhline(entropy, color=UNIGRAM_COLOUR, linestyle="--", label=f"unigram entropy ({entropy:.2f})")
    _name_last(axes, curves, "val_loss", "{:.2f}")
    ranks = "1 process" if about["ranks"] == 1 else f"{about['ranks']} ranks, {about['strategy']}"
    axes.set_title(f"Loss ({about['parameters']:,} parameters, {ranks})", fontsize=11)
    axes.set_ylabel("nats per byte")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def _step_size(axes: Axes, curves: Sequence[Curve]) -> None:
    """The step size d over the steps, or the learning rate where no optimizer finds a d."""
    finds_d = any("d" in row for curve in curves for row in curve.rows)
    name = "d" if finds_d else "lr"
    for curve in curves:
        # Beside those that find d, the learning rate of one that does not.
        axes.plot(*curve.series(name if curve.series(name)[0] else "lr"), color=curve.colour, linewidth=2.0)
    axes.set_yscale("log" if finds_d else "linear")
    _name_last(axes, curves, name, "{:.1e}")
    about = curves[0].about
    optimizer, schedule = about.get("optimizer", DEFAULT_OPTIMIZER), about.get("schedule", CONSTANT)
    times = "no schedule" if schedule == CONSTANT else f"times a {schedule}"
    what = (
        f"Step size d, found by {optimizer} (no learning rate, {times})" if finds_d else f"Learning rate of {optimizer}"
    )
    axes.set_title(what, fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("d, log scale" if finds_d else "learning rate")
    axes.grid(alpha=0.3)


def _name_last(axes: Axes, curves: Sequence[Curve], name: str, form: str) -> None:
    """Write the last value of each curve at its end, the higher one higher."""
    ends = [
        (values[-1], steps[-1], curve.colour) for curve in curves for steps, values in [curve.series(name)] if values
    ]
    for place, (value, step, colour) in enumerate(sorted(ends)):
        axes.annotate(
            form.format(value),
            (step, value),
            xytext=(8, 12 * (place - (len(ends) - 1) / 2)),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )


def _smoothed(values: list[float]) -> list[float]:
    reach = math.ceil(SMOOTHED_PART * len(values) / 2)
    around = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(some) / len(some) for some in around]


def main() -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, its --output")
    parser.add_argument("--picture", type=Path, help="file to write (default: training.png in the first folder)")
    arguments = parser.parse_args()
    runs = [RunFolder(path) for path in arguments.folders]
    for run in runs:
        if not run.rows() or not run.description():
            parser.error(f"{run.path} holds no run: name the --output of one that has made a step")
    picture = arguments.picture or runs[0].picture
    draw(runs, picture)
    print(f"picture            {picture}")


if __name__ == "__main__":
    main()
