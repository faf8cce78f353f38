"""The picture of a run: has d settled?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ppsf_dist.extras import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f5fa6", "#d1495b", "#2a7f62", "#8a5fb0", "#c77f2a", "#555555")
SETTLED = 1.01
"""d has settled where it grows by less than this for the rest of the run."""

Rows = Sequence[Mapping[str, Any]]


def settled_at(rows: Rows, group: int = 0) -> int | None:
    """The step from which on d stayed as it was at the end; None where it grew in the last tenth of the rows."""
    steps, values = series(rows, "d", group)
    if not values:
        return None
    at = next(step for step, value in zip(steps, values, strict=True) if value * SETTLED >= values[-1])
    return at if at <= steps[0] + 0.9 * (steps[-1] - steps[0]) or at == steps[0] else None


def series(rows: Rows, name: str, group: int | None = None) -> tuple[list[int], list[float]]:
    """Steps and values of a number, of a group or of the row, where there is one."""
    found = [
        (row["step"], (row if group is None else row["groups"][group]).get(name)) for row in rows if "groups" in row
    ]
    return [step for step, value in found if value is not None], [value for _, value in found if value is not None]


def draw(rows: Rows, path: Path) -> None:
    """Write the picture of some rows.

    Args:
        rows: of a monitor.
        path: file to write.

    Raises:
        ValueError: there are no rows yet.
        ModuleNotFoundError: the ``report`` extra is not there.
    """
    if not rows:
        raise ValueError("there is nothing to draw: no row has been made yet; take more steps, or set every lower")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing(error, "report", ("matplotlib",)) from error

    groups = range(len(rows[-1]["groups"]))
    finds_d = any("d" in group for group in rows[-1]["groups"])
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    figure.suptitle(verdict(rows), fontsize=13)
    for group in groups:
        colour, of = COLOURS[group % len(COLOURS)], f" of group {group}" if len(groups) > 1 else ""
        top.plot(
            *series(rows, "d" if finds_d else "lr", group),
            color=colour,
            linewidth=2,
            label=f"d{of}" if finds_d else "lr",
        )
        if finds_d:
            steps, values = series(rows, "estimate", group)
            above = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
            top.plot(
                *zip(*above, strict=True) if above else ([], []), color=colour, linestyle=":", label=f"its estimate{of}"
            )
            at = settled_at(rows, group)
            if at is not None:
                top.axvline(at, color=colour, linewidth=0.8, alpha=0.5)
        middle.plot(*series(rows, "update_rms", group), color=colour, label=f"step of z{of}, in units of d lr")
        bottom.plot(*series(rows, "gradient_norm", group), color=colour, label=f"length of the gradient{of}")
    top.set(yscale="log" if finds_d else "linear", ylabel="step size")
    middle.set(ylabel="root mean square")
    bottom.set(xlabel="step", yscale="log", ylabel="gradient")
    steps, losses = series(rows, "loss")
    if losses:
        beside = bottom.twinx()
        beside.plot(steps, losses, color="#888888", label="loss")
        beside.set_ylabel("loss")
        _legend(beside, "upper right")
    _legend(top, "lower right")
    _legend(middle, "upper right")
    _legend(bottom, "upper center")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def verdict(rows: Rows) -> str:
    """One line: whether d has settled, of the first group that has one."""
    for group in range(len(rows[-1]["groups"])):
        _, values = series(rows, "d", group)
        if values:
            at, last = settled_at(rows, group), rows[-1]["step"]
            if at is None:
                return f"d has not settled: {values[-1]:.2e} after {last} steps and growing"
            return f"d settled at step {at}: {values[-1]:.2e}, unchanged up to step {last}"
    return f"{rows[-1]['step']} steps"


def _legend(axes: Axes, place: Literal["upper right", "upper center", "lower right"]) -> None:
    axes.legend(loc=place, fontsize=8, frameon=False)
