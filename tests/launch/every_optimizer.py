"""Several --optimizer of train.py after each other in one start: ``every_optimizer.py FOLDER NAME,... OPTIONS``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import torch.distributed as dist

import ppsf_dist
import train
from options import parse


def main() -> None:
    folder, names, options = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    ranks = ppsf_dist.init_process_group()
    for name in names:
        settings = parse(["--optimizer", name, "--output", str(folder / name), *options])
        if train.run(settings, ranks):
            raise SystemExit(f"{name} ended with a signal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
