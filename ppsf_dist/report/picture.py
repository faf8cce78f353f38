"""The picture of several runs: loss and d over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.figure import Figure

from ppsf_dist.monitor.picture import COLOURS
from ppsf_dist.report.runs import OF_THE_LOSS, OF_THE_VALIDATION, Run


def draw(runs: Sequence[Run]) -> bytes:
    """The picture as a PNG.

    Args:
        runs: each in a colour of its own; validation losses are dots, the d of further groups is dashed.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        steps, losses = run.line(OF_THE_LOSS)
        top.plot(steps, losses, color=colour, linewidth=1.2, alpha=0.8, label=run.name)
        steps, losses = run.line(OF_THE_VALIDATION)
        top.plot(steps, losses, color=colour, marker="o", markersize=4, linestyle=":")
        for group, (steps, ds) in enumerate(run.ds()):
            bottom.plot(steps, ds, color=colour, linestyle="-" if group == 0 else "--", label=run.name)
    top.set_ylabel("loss (dots: validation)")
    bottom.set(xlabel="step", ylabel="d")
    if any(run.ds() for run in runs):
        bottom.set_yscale("log")
    top.legend(fontsize=9, frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
