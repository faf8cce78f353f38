"""The one call that starts ``torch.distributed``."""

from __future__ import annotations

import atexit
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch has it, its stubs do not

from ppsf_dist.bootstrap import mpi, slurm
from ppsf_dist.bootstrap.meeting import DEFAULT_TIMEOUT, port_is_taken
from ppsf_dist.bootstrap.place import LOOPBACK, RENDEZVOUS, Place, half_set, optional_integer, place_from_environment

GPU_BACKEND = "cpu:gloo,cuda:nccl"  # gloo too, so that checkpoints and object collectives can stay on the host
CPU_BACKEND = "gloo"
EXIT_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class ProcessInfo:
    """This process among its peers.

    Args:
        rank: index among all processes.
        local_rank: index among the processes of this host.
        world_size: number of processes.
        local_world_size: number of processes on this host.
        device: where this process computes: its GPU, or the CPU.
        launcher: "python", "torchrun", "deepspeed", "mpirun", "srun"; "env" where something else set torch's variables
            or had initialised ``torch.distributed`` already.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    launcher: str


_info: ProcessInfo | None = None


def init_process_group(backend: str | None = None, timeout: timedelta | None = None) -> ProcessInfo:
    """Starts ``torch.distributed`` whatever launched this process, and says which of the processes it is.

    The same script runs under plain ``python`` (a group of one, because ``fully_shard`` and collectives need a group),
    ``torchrun``, the ``deepspeed`` launcher, ``srun``, and ``mpirun`` (needs mpi4py, with the MPI library of that
    mpirun). Afterwards RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR and MASTER_PORT are set
    as torchrun sets them, and the GPU of this process, if it has one, is the current device. All ranks have to call
    this. A second call changes nothing and returns the same; a group that someone else initialised is taken as it is.

    Under mpirun, MPI is finalized before this returns, unless it was initialised before: a script that goes on using
    MPI imports ``mpi4py.MPI`` first and runs as ``python -m mpi4py script.py``, so that a failing rank ends the others.

    Args:
        backend: as for ``torch.distributed.init_process_group``. By default NCCL and gloo where there is a GPU, else
            gloo. One that names neither nccl nor cuda keeps this process on the CPU.
        timeout: of collectives (default: torch's) and for the ranks to find each other (default: 5 minutes).

    Raises:
        RuntimeError: torch's variables are half set or contradict the launcher, mpi4py is missing or has loaded an MPI
            library that does not match the mpirun, the port is taken, or there are more processes than GPUs.
    """
    global _info
    if dist.is_initialized():
        if _info is None or (_info.rank, _info.world_size) != (dist.get_rank(), dist.get_world_size()):
            _info = _info_of_running_group()
        return _info

    place = _find_place(timeout or DEFAULT_TIMEOUT)
    on_gpu = torch.cuda.is_available() and (backend is None or "nccl" in backend or "cuda" in backend)
    if on_gpu and place.local_rank is not None:
        # Before the group, so that no process opens a context on a GPU of another.
        torch.cuda.set_device(_gpu(place.local_rank))
    _start(place, backend or (GPU_BACKEND if on_gpu else CPU_BACKEND), timeout)
    atexit.unregister(_pause_before_exit)
    atexit.register(_pause_before_exit)
    local_rank, local_world_size, group_rank = _on_this_host(place)
    device = torch.device("cpu")
    if on_gpu:
        device = _gpu(local_rank)
        torch.cuda.set_device(device)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    _export_local(local_rank, local_world_size, group_rank)
    _info = ProcessInfo(place.rank, local_rank, place.world_size, local_world_size, device, place.launcher)
    return _info


def _find_place(timeout: timedelta) -> Place:
    present = [name for name in RENDEZVOUS if os.environ.get(name)]
    mpi_variable = mpi.size_variable()
    if len(present) == len(RENDEZVOUS):
        place = place_from_environment()
        _refuse_leftovers(place, mpi_variable)
        return place
    if "RANK" in present or "WORLD_SIZE" in present:
        raise half_set(present)
    # mpirun before Slurm: in a Slurm job mpirun starts its daemons with srun, and the SLURM_* variables are theirs.
    if mpi_variable is not None:
        return mpi.place_from_mpi(mpi_variable, timeout)
    if slurm.is_step():
        return slurm.place_from_slurm(timeout)
    if present:
        raise half_set(present)
    return Place("python", 0, 1, LOOPBACK, _free_port(), 0, 1, 0, HashStore())


def _refuse_leftovers(place: Place, mpi_variable: str | None) -> None:
    """Variables left in a shell would make every process of mpirun or srun a world of its own, in silence."""
    variable = mpi_variable or ("SLURM_STEP_NUM_TASKS" if slurm.is_step() else None)
    started = optional_integer(variable) if variable else None
    if place.launcher == "env" and started is not None and place.world_size < started:
        raise RuntimeError(
            f"WORLD_SIZE={place.world_size} is set although {started} processes were started ({variable}={started}): "
            f"unset {', '.join(RENDEZVOUS)}, which an earlier run left behind."
        )


def _start(place: Place, backend: str, timeout: timedelta | None) -> None:
    if place.store is not None:
        dist.init_process_group(
            backend, store=place.store, rank=place.rank, world_size=place.world_size, timeout=timeout
        )
        return
    try:
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    except dist.DistNetworkError as error:
        if not port_is_taken(error):
            raise
        raise RuntimeError(
            f"MASTER_PORT={place.port} is taken on this host, perhaps by another job: choose a free one "
            f"(deepspeed --master_port, torchrun --master-port, or MASTER_PORT itself)."
        ) from error


def _info_of_running_group() -> ProcessInfo:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    on_gpu = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config())
    place = Place(
        "env",
        rank,
        world_size,
        address="",
        port=0,
        local_rank=optional_integer("LOCAL_RANK"),
        local_world_size=optional_integer("LOCAL_WORLD_SIZE"),
        group_rank=optional_integer("GROUP_RANK"),
    )
    local_rank, local_world_size, group_rank = _on_this_host(place)
    device = torch.device("cpu")
    if on_gpu:
        # Without LOCAL_RANK whoever made the group has chosen the GPU, and the current one is the only trace of that.
        device = torch.device("cuda", torch.cuda.current_device()) if place.local_rank is None else _gpu(local_rank)
        torch.cuda.set_device(device)
    _export_local(local_rank, local_world_size, group_rank)
    return ProcessInfo(rank, local_rank, world_size, local_world_size, device, place.launcher)


def _on_this_host(place: Place) -> tuple[int, int, int]:
    """Local rank, local world size and host index; from the host names of all ranks where the launcher left one out."""
    local_rank, local_world_size, group_rank = place.local_rank, place.local_world_size, place.group_rank
    if local_rank is None or local_world_size is None or group_rank is None:
        hosts = [""] * place.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        here = hosts[place.rank]
        local_rank = hosts[: place.rank].count(here) if local_rank is None else local_rank
        local_world_size = hosts.count(here)
        group_rank = list(dict.fromkeys(hosts)).index(here)
    return local_rank, local_world_size, group_rank


def _export_local(local_rank: int, local_world_size: int, group_rank: int) -> None:
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_world_size), GROUP_RANK=str(group_rank))


def _gpu(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if count == 1:
        # srun --gpus-per-task=1 and its like show each process its own GPU only.
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise RuntimeError(
            f"LOCAL_RANK={local_rank} has no GPU, this process sees {count}: start at most {count} processes on a "
            f'host, or pass backend="gloo" to compute on the CPU.'
        )
    return torch.device("cuda", local_rank)


def _pause_before_exit() -> None:
    """Keeps the exit code of a rank that fails right after a collective.

    Gloo's threads let go of the tensors of a collective after it is done, for which they need the interpreter. Where
    they find it shutting down, the process aborts, and its exit code is lost. Leaving the group would wait for them
    too, but also for collectives that a failing rank will never finish.
    """
    if dist.is_initialized():
        time.sleep(EXIT_PAUSE_SECONDS)


def _free_port() -> int:
    """A port for whatever initialises again after this group of one; nothing listens on it now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
