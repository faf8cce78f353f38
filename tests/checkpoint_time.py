"""Prints how long it takes to save a checkpoint, to read it, and to compare it with its checksums.

python -m tests.checkpoint_time [FOLDER] [MIB]
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ppsf_dist.checkpoints import open_checkpoint, write_checkpoint

TRIES = 3


def seconds(task: Callable[[], object]) -> float:
    """The shortest of a few tries: the files are in memory then, which is where checking costs most beside reading."""
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        task()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    warnings.simplefilter("ignore")
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    mebibytes = int(sys.argv[2]) if len(sys.argv) > 2 else 512
    state = {"model": {f"w{i}": torch.randn(mebibytes << 14) for i in range(16)}, "optimizer": {"lr": 1.0}}
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        path = Path(folder)
        saving = seconds(lambda: write_checkpoint(path, lambda: state))
        files = open_checkpoint(path)
        into = {"model": {name: torch.empty_like(value) for name, value in state["model"].items()}}  # type: ignore[attr-defined]
        reading = seconds(lambda: files.load(into))
        opening = seconds(lambda: open_checkpoint(path, verify=False))
        checking = seconds(lambda: open_checkpoint(path)) - opening
    for name, value in {"save": saving, "read": reading, "check": checking}.items():
        print(f"{name:6} {value:7.3f} s  {mebibytes / 1024 / value:6.2f} GiB/s")


if __name__ == "__main__":
    main()
