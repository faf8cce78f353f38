"""Tables, JSON and charts of what was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Cost
from benchmarks.optimizers import BASELINE, OURS


def table(costs: Sequence[Cost], elements: int) -> str:
    """One line for each optimizer, in Markdown."""
    on_gpu = any(cost.host is not None for cost in costs)
    lines = [
        f"| optimizer | {'GPU ms' if on_gpu else 'ns/element'} | ratio (least to most) {'| host ms ' if on_gpu else ''}"
        f"| state B/element | peak beyond it | {'launches' if on_gpu else 'operators'} | waits |",
        f"|---|---|---|---|---|---|---|{'---|' if on_gpu else ''}",
    ]
    for cost in costs:
        peak = "?" if cost.peak is None else f"{cost.peak / 2**20:.0f} MB"
        spread = f"{cost.ratio:.2f} ({cost.least:.2f} to {cost.most:.2f})"
        time = f"{cost.seconds / elements * 1e9:.2f}" if cost.host is None else f"{cost.seconds * 1e3:.3f}"
        host = "" if cost.host is None else f"| {cost.host * 1e3:.2f} "
        lines.append(
            f"| {cost.name} | {time} | {spread} {host}| {cost.state / elements:.2f} | {peak} "
            f"| {cost.operators:,} | {cost.waits} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where this was measured."""
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: Path, costs: Sequence[Cost], elements: int, **what: Any) -> None:
    """Everything that was measured, and where."""
    content = {**what, "elements": elements, "machine": machine(), "costs": [asdict(cost) for cost in costs]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_chart(path: Path, costs: Sequence[Cost], title: str) -> None:
    """Bars of the ratios, ours marked, with their extremes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(costs, key=lambda cost: cost.ratio, reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(ordered)), layout="constrained")
    spread = [[c.ratio - c.least for c in ordered], [c.most - c.ratio for c in ordered]]
    colors = ["#1f6fb4" if c.name.startswith(OURS) else "#444444" if c.name == BASELINE else "#b8b8b8" for c in ordered]
    bars = axes.barh([c.name for c in ordered], [c.ratio for c in ordered], color=colors, xerr=spread, ecolor="#777777")
    for bar, cost in zip(bars, ordered, strict=True):
        axes.annotate(f"{cost.ratio:.1f}", (cost.most, bar.get_y() + bar.get_height() / 2), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_xlabel("time of a step, in steps of torch's fused AdamW")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
