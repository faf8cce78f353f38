"""Starts worker.py under each launcher through the scripts of launch/, and reads what the ranks print."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
RANKS = 2
MPICH = Path(sysconfig.get_path("scripts")) / "mpirun"
# What a launcher above this test session, or an earlier test in it, may have left in the environment.
FOREIGN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "MASTER_",
    "TORCHELASTIC_",
    "OMPI_",
    "PMI",
    "MPI",
    "SLURM_",
    "CROSS",
    "PPSF_SECRET",
)

SRUN = """#!{python}
# Starts two tasks on two hosts, which are both this one, with the variables that srun sets.
import os, subprocess, sys

command = [word for word in sys.argv[1:] if not word.startswith("--")]
assert "--kill-on-bad-exit=1" in sys.argv
step = dict(
    SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="2", SLURM_STEP_TASKS_PER_NODE="1(x2)",
    SLURM_STEP_NODELIST="localhost,other", SLURM_LOCALID="0",
)
tasks = [
    subprocess.Popen(command, env={{**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)}})
    for rank in (0, 1)
]
codes = [task.wait() for task in reversed(tasks)]
sys.exit(max(codes, key=lambda code: (code != 0, code)))
"""


@dataclass(frozen=True)
class Outcome:
    """What a launcher left behind.

    Args:
        code: its exit code.
        ranks: what each rank printed, in the order of ranks.
        text: all that was printed.
    """

    code: int
    ranks: list[dict[str, Any]]
    text: str


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Starts a command with the environment of a fresh shell and these variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environment = {
        **clean,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "TRAIN_SCRIPT": str(WORKER),
        "NPROC_PER_NODE": str(RANKS),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Waits for a command of ``start``; one that hangs is ended with its test, and what it printed is shown."""
    try:
        text, _ = process.communicate()
    except BaseException:
        # Launchers pass SIGTERM on to their ranks, SIGKILL would leave those behind.
        os.killpg(process.pid, signal.SIGTERM)
        sys.stdout.write(process.communicate()[0])
        raise
    lines = [line[line.index("{") :] for line in text.splitlines() if '{"rank"' in line]
    ranks = sorted((json.loads(line) for line in lines), key=lambda found: int(found["rank"]))
    return Outcome(process.returncode, ranks, text)


def run(command: list[str], **variables: str) -> Outcome:
    """Runs a command as ``start`` does, to its end."""
    return finish(start(command, **variables))


def python(*arguments: str, **variables: str) -> Outcome:
    return run([sys.executable, str(WORKER), *arguments], **variables)


def torchrun(*arguments: str, **variables: str) -> Outcome:
    # A failing rank is to fail once.
    return run([str(ROOT / "launch/torchrun.sh"), *arguments], MAX_RESTARTS="0", **variables)


def deepspeed(*arguments: str, **variables: str) -> Outcome:
    return run([str(ROOT / "launch/deepspeed.sh"), *arguments], DS_ACCELERATOR="cpu", **variables)


def mpich(*arguments: str, **variables: str) -> Outcome:
    return run([str(ROOT / "launch/mpirun.sh"), *arguments], **{"MPIRUN": str(MPICH), **variables})


def open_mpi(*arguments: str, **variables: str) -> Outcome:
    chosen = {
        "MPIRUN": str(open_mpi_mpirun()),
        "MPIRUN_FLAGS": "--oversubscribe",
        "MPI4PY_LIBMPI": open_mpi_library(),
    }
    return run([str(ROOT / "launch/mpirun.sh"), *arguments], **{**chosen, **variables})


def slurm(folder: Path) -> Callable[..., Outcome]:
    """A run of slurm.sbatch with an imitation of srun, written to ``folder``, in the place of a Slurm."""
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": "#!/bin/sh\necho scontrol $@\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def launch(*arguments: str, **variables: str) -> Outcome:
        return run(
            ["bash", str(ROOT / "launch/slurm.sbatch"), *arguments],
            PATH=f"{folder}:{os.environ['PATH']}",
            **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), **variables},
        )

    return launch


def open_mpi_mpirun() -> Path:
    """The mpirun of an Open MPI: what PPSF_OPENMPI names, build/openmpi, or Debian's."""
    named = os.environ.get("PPSF_OPENMPI")
    local = ROOT / "build/openmpi/bin/mpirun"
    found = named or (str(local) if local.exists() else shutil.which("mpirun.openmpi"))
    assert found, (
        "There is no Open MPI to test with: run launch/test.sh, which installs one in build/openmpi, set PPSF_OPENMPI "
        'to the path of its mpirun, or leave these tests out with -m "not launch".'
    )
    return Path(found)


def open_mpi_library() -> str:
    """The libmpi of that Open MPI."""
    beside = open_mpi_mpirun().parents[1] / "lib/libmpi.so.40"
    return str(beside) if beside.exists() else "libmpi.so.40"


def listener(port: int = 0) -> socket.socket:
    """A program of someone else, which accepts connections on a port and says nothing."""
    taken = socket.socket()
    taken.bind(("", port))
    taken.listen()
    return taken
