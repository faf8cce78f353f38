"""Processes started by ``srun``: ranks from SLURM_* variables, no MPI needed."""

from __future__ import annotations

import os
import re
import zlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch has it, its stubs do not

from ppsf_dist.bootstrap.meeting import ANY_PORT, announced, ask, join_store, open_store
from ppsf_dist.bootstrap.place import LOOPBACK, Place, integer, optional_integer, text

FIRST_PORT = 20000
PORT_COUNT = 12000  # ends below 32768, where Linux starts to hand out ports of its own
CANDIDATES = 8


def is_step() -> bool:
    """Whether this process is one of several of a Slurm job step (not a batch script, not an interactive shell)."""
    return bool(os.environ.get("SLURM_STEP_ID")) and (optional_integer("SLURM_STEP_NUM_TASKS") or 1) > 1


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list, such as ``n07`` of ``n[07-09,12],login``."""
    first = re.match(r"(\[[^\]]*\]|[^,\[])+", nodelist)
    if first is None:
        raise RuntimeError(f"SLURM_STEP_NODELIST={nodelist!r} names no host: set MASTER_ADDR to the host of rank 0.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def tasks_on_host(tasks_per_node: str, host: int) -> int:
    """The number of tasks on one host, from Slurm's short form, such as 2 for host 3 of ``4(x3),2``."""
    counts: list[int] = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(tasks)] * int(repeats or 1)
    if host >= len(counts):
        raise RuntimeError(f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} has no host {host}: start through srun.")
    return counts[host]


def step_token() -> str:
    """A word that no other job step uses: steps that share a host recognise their own rank 0 by it."""
    return f"ppsf_dist:{text('SLURM_JOB_ID')}.{text('SLURM_STEP_ID')}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def candidate_ports(token: str) -> list[int]:
    """The ports on which rank 0 of this step may announce its store, in the order in which it tries them."""
    return [FIRST_PORT + zlib.crc32(f"{token}/{i}".encode()) % PORT_COUNT for i in range(CANDIDATES)]


def place_from_slurm(timeout: timedelta) -> Place:
    """The place of this task of a Slurm step; every task of the step has to call this.

    Slurm gives the tasks no channel to agree on a port. Each derives the same few ports from the step's id; on the
    first of them that is free rank 0 tells the others where the store listens.

    Raises:
        RuntimeError: a variable of Slurm is missing, or the ranks do not all find each other within ``timeout``.
    """
    rank, world_size = integer("SLURM_PROCID"), integer("SLURM_STEP_NUM_TASKS")
    node = integer("SLURM_NODEID")
    one_host = optional_integer("SLURM_STEP_NUM_NODES") == 1
    address = os.environ.get("MASTER_ADDR") or (LOOPBACK if one_host else first_host(text("SLURM_STEP_NODELIST")))
    token = step_token()
    ports = candidate_ports(token)

    if rank == 0:
        store = open_store(address, optional_integer("MASTER_PORT") or ANY_PORT, world_size, timeout)
        with announced(store.port, token, ports):
            _await_peers(store, world_size, timeout)
    else:
        store = join_store(address, ask(address, ports, token, timeout), world_size, timeout)
        store.set(_joined(rank), "")
    return Place(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        address=address,
        port=store.port,
        local_rank=integer("SLURM_LOCALID"),
        local_world_size=tasks_on_host(text("SLURM_STEP_TASKS_PER_NODE"), node),
        group_rank=node,
        store=store,
    )


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _await_peers(store: TCPStore, world_size: int, timeout: timedelta) -> None:
    peers = range(1, world_size)
    try:
        store.wait([_joined(peer) for peer in peers])
    except dist.DistStoreError as error:
        missing = [peer for peer in peers if not store.check([_joined(peer)])]
        raise RuntimeError(
            f"Ranks {missing} did not come within {timeout}: see whether they started, and set MASTER_ADDR to an "
            f"address of this host that theirs reach."
        ) from error
