"""The first steps of a training under the microscope: ``python -m benchmarks.quality.ramp``.

Trains with the default and with the recommended setting and shows how far z moves in a step, as a multiple of d, while
d grows and afterwards; and draws d, the estimate that it is compared with, this movement, and the loss over the steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppsf_dist
from benchmarks.quality.rivals import DEFAULT, OURS, RECOMMENDED, RIVALS
from benchmarks.quality.workloads import WORKLOADS

STEPS = 300
DIFFERENT = [name for name in WORKLOADS if not name.endswith("-long")]
"""The others begin as these do."""
COLOURS = {DEFAULT: "#7fb2dd", RECOMMENDED: "#1f5fa6"}


class Step(NamedTuple):
    """What one step did.

    Attributes:
        d: step size that it used.
        estimate: d as this step's sums would have it, before it is compared with the one in use.
        moved: root mean square of the movement of z, a multiple of d.
        loss: of the batch.
    """

    d: float
    estimate: float
    moved: float
    loss: float


def watch(workload: str, rival: str, seed: int, steps: int) -> list[Step]:
    """Trains for some steps and returns what each did."""
    torch.manual_seed(seed)
    task = WORKLOADS[workload].task(seed)
    trained = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = ppsf_dist.ProdigyPlusScheduleFree(trained, **OURS[rival])
    found: list[Step] = []
    for step in range(1, steps + 1):
        loss = task.loss(step)
        optimizer.zero_grad()
        loss.backward()
        before = [_z(optimizer, p) for p in trained]
        [d] = optimizer.get_d()
        optimizer.step()
        square = sum(float((_z(optimizer, p) - z).square().sum()) for p, z in zip(trained, before, strict=True))
        group = optimizer.param_groups[0]
        estimate = group["d_numerator"] / group["d_denom"] if group["d_denom"] > 0 else math.nan
        found.append(Step(d, estimate, math.sqrt(square / sum(p.numel() for p in trained)) / d, float(loss)))
    return found


def _z(optimizer: Any, p: Tensor) -> Tensor:
    z: Tensor = optimizer.state[p].get("z", p) if p in optimizer.state else p
    return z.detach().clone()


def draw(runs: dict[str, list[Step]], title: str, path: Path) -> None:
    """One column of three pictures: step sizes, movement in them, loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for rival, steps in runs.items():
        places, colour, name = range(1, len(steps) + 1), COLOURS[rival], RIVALS[rival].title
        top.plot(places, [step.d for step in steps], color=colour, label=f"d, {name}", linewidth=2)
        estimates = [step.estimate if step.estimate > 0 else math.nan for step in steps]
        top.plot(places, estimates, color=colour, linestyle=":", label="its estimate, where it is positive")
        middle.plot(places, [step.moved for step in steps], color=colour, label=name)
        bottom.plot(places, [step.loss for step in steps], color=colour, label=name)
    top.set(yscale="log", ylabel="step size, log scale", title=title)
    middle.set(ylabel="movement of z, times d")
    middle.axhline(1, color="#444444", linestyle="--", linewidth=0.8)
    bottom.set(xlabel="step", ylabel="loss of the batch")
    for axes in (top, middle, bottom):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(workloads: Sequence[str], seed: int, steps: int) -> str:
    """For each workload how far z moves while d grows, and afterwards: root mean square, times d."""
    lines = [
        "| workload | d, default | recommended | while d grows, default | recommended | afterwards, default "
        "| recommended |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload in workloads:
        runs = [watch(workload, rival, seed, steps) for rival in COLOURS]
        d = [f"{run[-1].d:.1e}" for run in runs]
        grows, after = zip(*(_before_and_after(run) for run in runs), strict=True)
        lines.append(f"| `{workload}` | " + " | ".join([*d, *(f"{x:.2f}" for x in (*grows, *after))]) + " |")
    return "\n".join(lines)


def _before_and_after(run: list[Step]) -> tuple[float, float]:
    settled = next(i for i, step in enumerate(run) if step.d == run[-1].d)
    parts = run[: settled + 1], run[settled + 1 :]
    grows, after = (statistics.fmean(step.moved for step in part) if part else math.nan for part in parts)
    return grows, after


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.ramp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", nargs="+", default=DIFFERENT, choices=list(WORKLOADS), metavar="NAME",
                        help="of the table; the first has a picture (default: all but the longer)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--picture", type=Path, help="file to draw")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(table(arguments.workloads, arguments.seed, arguments.steps))
    if arguments.picture:
        first = arguments.workloads[0]
        runs = {rival: watch(first, rival, arguments.seed, arguments.steps) for rival in COLOURS}
        draw(runs, f"The first {arguments.steps} steps of {first}", arguments.picture)


if __name__ == "__main__":
    main()
