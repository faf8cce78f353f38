"""Processes started by ``mpirun``: MPI only to agree on ranks, address and port, then it is finalized.

While MPI is up, its exit handlers would wait for all ranks when one of them fails. With MPI finalized, mpirun watches
plain processes: the traceback and the exit code of a failing rank survive and the others are ended at once.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from types import ModuleType

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch has it, its stubs do not

from ppsf_dist.bootstrap.meeting import ANY_PORT, address_towards, join_store, open_store, own_address
from ppsf_dist.bootstrap.place import LARGEST_PORT, LOOPBACK, Place, integer, optional_integer

# Hydra (MPICH, Intel MPI) sets MPI_LOCALNRANKS beside PMI_SIZE; srun --mpi=pmi2 sets PMI_SIZE alone.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")


def size_variable() -> str | None:
    """The variable with which an mpirun tells the number of its processes; None without an mpirun."""
    name = next((name for name in SIZE_VARIABLES if os.environ.get(name)), None)
    by_srun = name == "PMI_SIZE" and os.environ["PMI_SIZE"] == os.environ.get("SLURM_STEP_NUM_TASKS")
    return None if by_srun and not os.environ.get("MPI_LOCALNRANKS") else name


def place_from_mpi(variable: str, timeout: timedelta) -> Place:
    """The place of this process among those of mpirun; every one of them has to call this.

    MPI is finalized before this returns, unless the caller had initialised it.

    Args:
        variable: the environment variable with the number of processes.
        timeout: how long ranks wait for the store of rank 0.

    Raises:
        RuntimeError: mpi4py is missing, its MPI library is not that of the mpirun, or rank 0 has no address or port.
    """
    MPI = _load_mpi(variable)
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    try:
        return _agree(MPI, variable, timeout)
    finally:
        if ours:
            MPI.Finalize()


def _load_mpi(variable: str) -> ModuleType:
    started = f"mpirun started this process ({variable}={os.environ[variable]})"
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.initialize = False
            mpi4py.rc.finalize = False
        from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(
            f"{started} but mpi4py cannot be imported: pip install mpi4py, or start through torchrun."
        ) from error
    except RuntimeError as error:
        raise RuntimeError(
            f"{started} but mpi4py finds no MPI library: set MPI4PY_LIBMPI to the libmpi.so of this mpirun."
        ) from error
    if MPI.Is_finalized():
        raise RuntimeError(f"{started} but MPI is finalized already: call init_process_group before MPI.Finalize.")
    # MPICH ends the process in MPI_Init, with no sentence of ours, when the mpirun is Open MPI's.
    if variable.startswith("OMPI") and MPI.get_vendor()[0] == "MPICH":
        raise _mismatch(MPI, variable, "of another kind")
    return MPI


def _mismatch(MPI: ModuleType, variable: str, finding: str) -> RuntimeError:
    library = MPI.Get_library_version().splitlines()[0].strip()
    return RuntimeError(
        f"The MPI library that mpi4py loaded ({library}) is {finding} than the mpirun "
        f"that set {variable}={os.environ[variable]}: set MPI4PY_LIBMPI to the libmpi.so of that mpirun, "
        f"or use the mpirun of that library."
    )


def _agree(MPI: ModuleType, variable: str, timeout: timedelta) -> Place:
    world = MPI.COMM_WORLD
    rank, world_size = int(world.rank), int(world.size)
    if world_size != integer(variable):
        raise _mismatch(MPI, variable, f"another one (it sees {world_size} process{'es' if world_size > 1 else ''})")
    local = world.Split_type(MPI.COMM_TYPE_SHARED, key=rank)
    heads = world.Split(0 if local.rank == 0 else MPI.UNDEFINED, key=rank)
    hosts: list[str] = local.bcast(heads.allgather(MPI.Get_processor_name()) if local.rank == 0 else None)
    group_rank: int = local.bcast(heads.rank if local.rank == 0 else None)

    store: TCPStore | None = None
    meeting: tuple[str, int] | str = ""
    if rank == 0:
        # An error goes to the others by the same broadcast: they would wait for it otherwise.
        try:
            other_host = hosts[1] if len(hosts) > 1 else None
            address = os.environ.get("MASTER_ADDR") or (address_towards(other_host) if other_host else LOOPBACK)
            port = optional_integer("MASTER_PORT", most=LARGEST_PORT) or ANY_PORT
            store = open_store(own_address(address, other_host), port, world_size, timeout)
            meeting = (address, store.port)
        except RuntimeError as error:
            meeting = str(error)
    meeting = world.bcast(meeting)
    if isinstance(meeting, str):
        raise RuntimeError(f"Rank 0 could not open the store where the ranks meet: {meeting}")
    address, port = meeting
    return Place(
        launcher="mpirun",
        rank=rank,
        world_size=world_size,
        address=address,
        port=port,
        local_rank=int(local.rank),
        local_world_size=int(local.size),
        group_rank=group_rank,
        store=store or join_store(address, port, world_size, timeout),
    )
