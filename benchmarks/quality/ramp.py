"""The first steps of a training under the microscope: ``python -m benchmarks.quality.ramp``.

Trains a workload with the default and with the recommended setting and draws, over the steps: d and the step that it is
found by (the estimate of d before it is compared with d), and how far z moves, as a multiple of d.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppsf_dist
from benchmarks.quality.rivals import DEFAULT, OURS, RECOMMENDED, RIVALS
from benchmarks.quality.workloads import WORKLOADS

STEPS = 300
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
        top.plot(
            places, [max(step.estimate, 1e-9) for step in steps], color=colour, linestyle=":", label="its estimate"
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.ramp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", default="bytes-small-short", choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--picture", type=Path, default=Path("runs/quality/ramp.png"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    runs = {rival: watch(arguments.workload, rival, arguments.seed, arguments.steps) for rival in COLOURS}
    print(
        "| | d at the end | largest movement of z, times d | its mean over steps 1 to 50 | 51 to 100 | the last 100 |"
    )
    print("|---|---|---|---|---|---|")
    for rival, steps in runs.items():
        moved = [step.moved for step in steps]
        means = (sum(part) / max(1, len(part)) for part in (moved[:50], moved[50:100], moved[-100:]))
        print(
            f"| {RIVALS[rival].title} | {steps[-1].d:.2e} | {max(moved):.2f} | "
            + " | ".join(f"{m:.2f}" for m in means)
            + " |"
        )
    draw(runs, f"The first {arguments.steps} steps of {arguments.workload}", arguments.picture)


if __name__ == "__main__":
    main()
