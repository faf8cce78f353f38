"""Processes started by ``srun``: ranks from SLURM_* variables, no MPI needed."""

from __future__ import annotations

import hmac
import logging
import os
import re
import zlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch has it, its stubs do not

from ppsf_dist.bootstrap.announcement import announced, ask
from ppsf_dist.bootstrap.meeting import ANY_PORT, join_store, open_store, own_address
from ppsf_dist.bootstrap.place import LARGEST_PORT, LOOPBACK, Place, integer, optional_integer, text

FIRST_PORT = 20000
PORT_COUNT = 12000  # ends below 32768, where Linux starts to hand out ports of its own
CANDIDATES = 8
SECRET = "PPSF_SECRET"
SHORTEST_SECRET = 16

logger = logging.getLogger(__name__)


def is_step() -> bool:
    """Whether this process is one of several of a Slurm job step (not a batch script, not an interactive shell)."""
    return bool(os.environ.get("SLURM_STEP_ID")) and (optional_integer("SLURM_STEP_NUM_TASKS") or 1) > 1


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list, such as ``n07`` of ``n[07-09,12],login``."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", _entries(nodelist)[0])


def last_host(nodelist: str) -> str:
    """The last host of a Slurm node list, such as ``n12`` of ``login,n[07-09,12]``."""
    return re.sub(r"\[[^\]]*?(\w+)\]", r"\1", _entries(nodelist)[-1])


def _entries(nodelist: str) -> list[str]:
    entries = re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist)
    if not entries:
        raise RuntimeError(f"SLURM_STEP_NODELIST={nodelist!r} names no host: set MASTER_ADDR to the host of rank 0.")
    return entries


def tasks_on_host(tasks_per_node: str, host: int) -> int:
    """The number of tasks on one host, from Slurm's short form, such as 2 for host 3 of ``4(x3),2``."""
    hosts = 0
    for entry in tasks_per_node.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", entry)
        if found is None:
            break
        hosts += int(found[2] or 1)
        if host < hosts:
            return int(found[1])
    raise RuntimeError(f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} has no host {host}: start through srun.")


def step_token() -> str:
    """A word that no other job step uses: steps that share a host recognise their own rank 0 by it."""
    return f"ppsf_dist:{text('SLURM_JOB_ID')}.{text('SLURM_STEP_ID')}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def step_key(rank: int) -> bytes:
    """What the ranks of this step prove to know before they tell each other anything.

    It comes from PPSF_SECRET, which ``launch/slurm.sbatch`` makes, and from the step's id, so that the steps of a job
    tell each other apart. Slurm itself gives the tasks of a step nothing that other users cannot look up: without
    PPSF_SECRET the key keeps jobs apart, and keeps out who does not know the id of the job, but not who does.

    Raises:
        RuntimeError: PPSF_SECRET is short enough to be guessed.
    """
    secret = os.environ.get(SECRET, "")
    if 0 < len(secret) < SHORTEST_SECRET:
        raise RuntimeError(
            f"{SECRET} has {len(secret)} characters and could be guessed: allowed are {SHORTEST_SECRET} or more, such "
            f"as those of export {SECRET}=$(openssl rand -hex 32), or unset it."
        )
    if not secret and rank == 0:
        logger.warning(
            "%s is not set: who knows the id of this job can ask rank 0 where the ranks meet. On a network with "
            "strangers export %s=$(openssl rand -hex 32) before srun, or start through launch/slurm.sbatch.",
            SECRET,
            SECRET,
        )
    return hmac.digest(os.fsencode(secret), step_token().encode(), "sha256")


def candidate_ports(token: str) -> list[int]:
    """The ports on which rank 0 of this step may announce its store, in the order in which it tries them."""
    return [FIRST_PORT + zlib.crc32(f"{token}/{i}".encode()) % PORT_COUNT for i in range(CANDIDATES)]


def place_from_slurm(timeout: timedelta) -> Place:
    """The place of this task of a Slurm step; every task of the step has to call this.

    Slurm gives the tasks no channel to agree on a port. Each derives the same few ports from the step's id; on the
    first of them that is free rank 0 tells the others where the store listens, once they have proved that they belong
    to the step.

    Raises:
        RuntimeError: a variable of Slurm is missing, PPSF_SECRET is too short, MASTER_ADDR is not rank 0's host, or the
            ranks do not all find each other within ``timeout``.
    """
    rank, world_size = integer("SLURM_PROCID"), integer("SLURM_STEP_NUM_TASKS")
    node = integer("SLURM_NODEID")
    one_host = optional_integer("SLURM_STEP_NUM_NODES") == 1
    address = os.environ.get("MASTER_ADDR") or (LOOPBACK if one_host else first_host(text("SLURM_STEP_NODELIST")))
    key, ports = step_key(rank), candidate_ports(step_token())

    if rank == 0:
        address = own_address(address, None if one_host else last_host(text("SLURM_STEP_NODELIST")))
        store = open_store(address, optional_integer("MASTER_PORT", most=LARGEST_PORT) or ANY_PORT, world_size, timeout)
        with announced(store.port, key, address, ports):
            _await_peers(store, world_size, timeout)
    else:
        store = join_store(address, ask(address, ports, key, timeout), world_size, timeout)
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
        store.wait([_joined(peer) for peer in peers], timeout)
    except dist.DistStoreError as error:
        missing = [peer for peer in peers if not store.check([_joined(peer)])]
        raise RuntimeError(
            f"Ranks {missing} did not come within {timeout}: see whether they started, and set MASTER_ADDR to an "
            f"address of this host that theirs reach."
        ) from error
