"""What the launchers start in these tests: joins the group, adds up the ranks, and may fail on purpose.

Arguments: "raise" or "exit" makes rank 1 fail; "mpi" uses MPI before and after.
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
# Longer than the tests wait for a launcher: a launcher that leaves a failure to this timeout fails the test.
TIMEOUT = timedelta(minutes=10)
EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def fail(rank: int) -> None:
    """Ends rank 1 while gloo's threads are still busy, when an exit code is most easily lost; rank 0 waits for it."""
    works = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(64)]
    works[-1].wait()
    del works
    if rank == 1 and "raise" in sys.argv:
        raise ValueError("rank 1 fails on purpose")
    if rank == 1:
        sys.exit(EXIT_CODE)
    dist.barrier()


def main() -> None:
    own_mpi = None
    if "mpi" in sys.argv:
        from mpi4py import MPI

        own_mpi = MPI.COMM_WORLD
    info = init_process_group(timeout=TIMEOUT)
    total = torch.tensor([info.rank + 1.0], device=info.device)
    dist.all_reduce(total)
    if "raise" in sys.argv or "exit" in sys.argv:
        fail(info.rank)
    found = {
        **asdict(info),
        "device": str(info.device),
        "sum": total.item(),
        "mpi_sum": own_mpi.allreduce(info.rank + 1) if own_mpi else None,
        "same": init_process_group() is info,
        "environment": {name: os.environ.get(name) for name in EXPORTED},
    }
    # One write, so that the lines of two ranks do not mix.
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
