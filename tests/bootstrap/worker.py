"""What the launchers start in these tests: joins the group, adds up the ranks, and may fail on purpose.

Arguments: "raise" or "exit" makes rank 1 fail after the first collective, "hold" ends each rank without leaving the group.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from ppsf_dist.bootstrap import init_process_group

EXIT_CODE = 3
TIMEOUT = timedelta(seconds=60)
EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def main() -> None:
    info = init_process_group(timeout=TIMEOUT)
    total = torch.tensor([info.rank + 1.0], device=info.device)
    dist.all_reduce(total)
    if info.rank == 1 and "raise" in sys.argv:
        raise ValueError("rank 1 fails on purpose")
    if info.rank == 1 and "exit" in sys.argv:
        sys.exit(EXIT_CODE)
    # With a failed peer this waits until the launcher ends it.
    dist.all_reduce(total)
    found = {
        **asdict(info),
        "device": str(info.device),
        "sum": total.item(),
        "same": init_process_group() is info,
        "environment": {name: os.environ.get(name) for name in EXPORTED},
    }
    # One write, so that the lines of two ranks do not mix.
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
