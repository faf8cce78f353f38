"""What a launcher tells a process about itself, read from the environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]  # torch has it, its stubs do not

LOOPBACK = "127.0.0.1"
LARGEST_NUMBER = 999_999_999
LARGEST_PORT = 65535
# Programs disagree on what 08, +8 or the digits of other scripts mean: they are no numbers here.
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """A process among its peers, and where they meet.

    Args:
        launcher: "python", "torchrun", "deepspeed", "mpirun", "srun", or "env" for whatever else set the variables.
        rank: index among all processes.
        world_size: number of processes.
        address: host of rank 0.
        port: TCP port of rank 0.
        local_rank: index among the processes of this host; None where the launcher does not say.
        local_world_size: number of processes on this host; None where the launcher does not say.
        group_rank: index of this host; None where the launcher does not say.
        store: where the ranks meet, if it is open already; None leaves that to torch's ``env://``.
    """

    launcher: str
    rank: int
    world_size: int
    address: str
    port: int
    local_rank: int | None = None
    local_world_size: int | None = None
    group_rank: int | None = None
    store: Store | None = None


def text(name: str) -> str:
    """The value of an environment variable.

    Raises:
        RuntimeError: it is not set, or empty.
    """
    value = os.environ.get(name)
    if not value:
        raise RuntimeError(f"{name} is not set, the launcher should do so: start the script through the launcher.")
    return value


def integer(name: str, most: int = LARGEST_NUMBER) -> int:
    """The value of an environment variable that holds a number from 0 to ``most``.

    Raises:
        RuntimeError: it is not set, or no such number.
    """
    value = text(name)
    if not NUMBER.fullmatch(value) or int(value) > most:
        raise RuntimeError(
            f"{name}={value!r} must be an integer >= 0 and <= {most}, in decimal digits without leading zeros: unset "
            "it or let the launcher set it."
        )
    return int(value)


def optional_integer(*names: str, most: int = LARGEST_NUMBER) -> int | None:
    """The first of these environment variables that is set, as a number from 0 to ``most``; None where none is."""
    return next((integer(name, most) for name in names if os.environ.get(name)), None)


def half_set(present: list[str]) -> RuntimeError:
    """The error for an environment in which only ``present`` of torch's four rendezvous variables are set."""
    found = ", ".join(f"{name}={os.environ[name]}" for name in present)
    missing = ", ".join(name for name in RENDEZVOUS if name not in present)
    return RuntimeError(
        f"The environment has {found} but not {missing}: start the script through torchrun, deepspeed, mpirun or srun, "
        f"or unset {', '.join(present)} to run a single process."
    )


def place_from_environment() -> Place:
    """The place that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name (torchrun, deepspeed, or set by hand).

    Raises:
        RuntimeError: a variable is no number, or RANK is not below WORLD_SIZE.
    """
    rank, world_size = integer("RANK"), integer("WORLD_SIZE")
    if rank >= world_size:
        raise RuntimeError(f"RANK={rank} must be below WORLD_SIZE={world_size}: let the launcher set both.")
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        launcher = "torchrun"
    elif os.environ.get("CROSS_SIZE"):
        launcher = "deepspeed"
    else:
        launcher = "env"
    return Place(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        address=text("MASTER_ADDR"),
        port=integer("MASTER_PORT", LARGEST_PORT),
        local_rank=optional_integer("LOCAL_RANK"),
        # deepspeed has its own names for these two.
        local_world_size=optional_integer("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        group_rank=optional_integer("GROUP_RANK", "CROSS_RANK"),
    )
