"""What the launch scripts take from the environment is checked before anything uses it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bootstrap.launchers import FOREIGN, ROOT

# Prints the arguments, one in a line. As an mpirun it is MPICH, as an interpreter it sees no GPU.
STUB = """#!/bin/bash
case "$1" in
--version) echo stub ;;
-c) echo 1 ;;
*) printf '%s\\n' "$@" "requeue secret=${PPSF_SECRET:-}" ;;
esac
exit "${STUB_CODE:-0}"
"""
SCRIPTS = {"torchrun": "torchrun.sh", "mpirun": "mpirun.sh", "deepspeed": "deepspeed.sh", "slurm": "slurm.sbatch"}
TWO_HOSTS = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
NUMBER = "must be a whole number"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs a launch script with stubs in the place of all that it starts: exit code, stdout and stderr."""
    for name in ("python", "mpirun", "srun", "scontrol"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("# two hosts\n\nnode0 slots=8\nnode1 slots=8\n")
    # As sbatch runs it: a copy, far from the repository.
    spool = tmp_path / "slurm_script"
    spool.write_text((ROOT / "launch/slurm.sbatch").read_text())
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}

    def run(name: str, **variables: str) -> tuple[int, str, str]:
        environment = {
            **clean,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(ROOT),
            **{key: value.replace("HOSTFILE", str(tmp_path / "hostfile")) for key, value in variables.items()},
        }
        done = subprocess.run(
            ["bash", str(spool if name == "slurm" else ROOT / "launch" / SCRIPTS[name]), "--steps", "3"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


Start = Callable[..., tuple[int, str, str]]

REFUSED: list[tuple[str, dict[str, str], str, str]] = [
    ("torchrun", {"NPROC_PER_NODE": "2x"}, "NPROC_PER_NODE=2x", NUMBER),
    ("torchrun", {"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0", "from 1 to"),
    ("torchrun", {"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS=many", NUMBER),
    ("torchrun", {"PYTHON": "no-such-python"}, "PYTHON=no-such-python", "must be an interpreter"),
    ("torchrun", {"TRAIN_SCRIPT": "/no/script.py"}, "TRAIN_SCRIPT=/no/script.py", "must be the path of a file"),
    ("torchrun", {"NODE_RANK": "1"}, "NODE_RANK=1", "NNODES=1 says how many hosts there are"),
    ("torchrun", {**TWO_HOSTS, "NNODES": "0"}, "NNODES=0", "must be a number of hosts"),
    ("torchrun", {**TWO_HOSTS, "NNODES": "01"}, "NNODES=01", "must be a number of hosts"),
    ("torchrun", {**TWO_HOSTS, "NNODES": "2:1"}, "NNODES=2:1", "the fewest hosts before the most"),
    ("torchrun", {**TWO_HOSTS, "NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2", "from 0 to 1"),
    ("torchrun", {**TWO_HOSTS, "NODE_RANK": "08"}, "NODE_RANK=08", "without leading zeros"),
    ("torchrun", {**TWO_HOSTS, "NODE_RANK": "0a"}, "NODE_RANK=0a", NUMBER),
    ("torchrun", {**TWO_HOSTS, "NODE_RANK": "-1"}, "NODE_RANK=-1", NUMBER),
    ("torchrun", {**TWO_HOSTS, "NODE_RANK": "٠"}, "NODE_RANK=", NUMBER),
    ("torchrun", {**TWO_HOSTS, "NODE_RANK": "0\n"}, "NODE_RANK=$'0\\n'", NUMBER),
    ("torchrun", {**TWO_HOSTS, "NODE_RANK": "18446744073709551616"}, "NODE_RANK=18446744073709551616", NUMBER),
    ("torchrun", {**TWO_HOSTS, "NNODES": "1:2", "NODE_RANK": "08"}, "NODE_RANK=08", "without leading zeros"),
    ("torchrun", {**TWO_HOSTS, "MASTER_ADDR": "a b"}, "MASTER_ADDR=a\\ b", "must be one host name"),
    ("torchrun", {**TWO_HOSTS, "MASTER_ADDR": "--help"}, "MASTER_ADDR=--help", "must be one host name"),
    ("torchrun", {**TWO_HOSTS, "MASTER_PORT": "65536"}, "MASTER_PORT=65536", "from 1 to 65535"),
    ("torchrun", {**TWO_HOSTS, "LOCAL_ADDR": "x y"}, "LOCAL_ADDR=x\\ y", "must be one host name"),
    ("torchrun", {**TWO_HOSTS, "JOIN_TIMEOUT": "5,is_host=1"}, "JOIN_TIMEOUT=5\\,is_host=1", NUMBER),
    ("torchrun", {**TWO_HOSTS, "JOB_ID": "a job"}, "JOB_ID=a\\ job", "must be a word"),
    ("torchrun", {"MAX_RESTARTS": "3.5"}, "MAX_RESTARTS=3.5", NUMBER),
    ("mpirun", {"NPROC_PER_NODE": "2x"}, "NPROC_PER_NODE=2x", NUMBER),
    ("mpirun", {"NPROC_PER_NODE": "08"}, "NPROC_PER_NODE=08", "without leading zeros"),
    ("mpirun", {"HOSTS": "node0,,node1"}, "HOSTS=node0\\,\\,node1", "must be host names"),
    ("mpirun", {"HOSTS": "node0\nnode1"}, "HOSTS=$'node0\\nnode1'", "must be host names"),
    ("mpirun", {"MPIRUN_FLAGS": "-a\n-b"}, "MPIRUN_FLAGS=$'-a\\n-b'", "on one line"),
    ("mpirun", {"MASTER_ADDR": "a;b"}, "MASTER_ADDR=a\\;b", "must be one host name"),
    ("mpirun", {"MASTER_PORT": "port"}, "MASTER_PORT=port", "from 1 to 65535"),
    ("mpirun", {"MPIRUN": "no-such-mpirun"}, "MPIRUN=no-such-mpirun", "set MPIRUN to its path"),
    ("deepspeed", {"NPROC_PER_NODE": "2x"}, "NPROC_PER_NODE=2x", NUMBER),
    ("deepspeed", {"MASTER_PORT": "0"}, "MASTER_PORT=0", "from 1 to 65535"),
    ("deepspeed", {"NODE_RANK": "1"}, "NODE_RANK=1", "without HOSTFILE this host is the only one"),
    ("deepspeed", {"HOSTFILE": "/no/hosts"}, "HOSTFILE=/no/hosts", "must be the path of a file"),
    ("deepspeed", {"HOSTFILE": "/dev/null"}, "HOSTFILE=/dev/null", "must be the path of a file"),
    ("deepspeed", {"HOSTFILE": "HOSTFILE", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2", "names 2 hosts"),
    ("deepspeed", {"HOSTFILE": "HOSTFILE", "NODE_RANK": "0a", "MASTER_ADDR": "a"}, "NODE_RANK=0a", NUMBER),
    ("deepspeed", {"HOSTFILE": "HOSTFILE", "MASTER_ADDR": "a b"}, "MASTER_ADDR=a\\ b", "must be one host name"),
    ("slurm", {"MAX_REQUEUES": "3x"}, "MAX_REQUEUES=3x", NUMBER),
    ("slurm", {"SLURM_RESTART_COUNT": "08"}, "SLURM_RESTART_COUNT=08", "without leading zeros"),
    ("slurm", {"SLURM_JOB_ID": "7;8"}, "SLURM_JOB_ID=7\\;8", "must be a job's number"),
    ("slurm", {"OMP_NUM_THREADS": "x"}, "OMP_NUM_THREADS=x", NUMBER),
    ("slurm", {"SLURM_SUBMIT_DIR": "/no"}, "TRAIN_SCRIPT=/no/launch/train.py", "must be the path of a file"),
    ("slurm", {"PYTHON": "no-such-python"}, "PYTHON=no-such-python", "must be an interpreter"),
]


@pytest.mark.parametrize(("name", "variables", "named", "rule"), REFUSED)
def test_a_wrong_value_is_named_and_nothing_starts(
    start: Start, name: str, variables: dict[str, str], named: str, rule: str
) -> None:
    code, printed, errors = start(name, **variables)
    assert (code, printed) == (2, "")
    assert errors.count("\n") == 1 and errors.startswith(SCRIPTS[name])
    assert named in errors and rule in errors


NUMBERS = {
    "torchrun": ["NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_PORT", "JOIN_TIMEOUT", "MAX_RESTARTS"],
    "mpirun": ["NPROC_PER_NODE", "MASTER_PORT"],
    "deepspeed": ["NPROC_PER_NODE", "NODE_RANK", "MASTER_PORT"],
    "slurm": ["MAX_REQUEUES", "SLURM_RESTART_COUNT", "OMP_NUM_THREADS"],
}


@pytest.mark.parametrize(("name", "variable"), [(name, variable) for name in NUMBERS for variable in NUMBERS[name]])
def test_no_value_is_run(start: Start, tmp_path: Path, name: str, variable: str) -> None:
    ran = tmp_path / "ran"
    hosts = TWO_HOSTS if name == "torchrun" else {}
    value = f"BASH_VERSINFO[$(touch {ran})]"
    code, printed, errors = start(name, **{**hosts, variable: value, "STUB_CODE": "1" if name == "slurm" else "0"})
    assert not ran.exists()
    assert (code, printed) == (2, "") and f"{variable}=BASH_VERSINFO" in errors


def test_torchrun_starts_what_was_asked_for(start: Start) -> None:
    code, printed, errors = start("torchrun")
    assert (code, errors) == (0, "")
    assert "--standalone\n--nproc-per-node\n1\n--max-restarts\n3\n" in printed and printed.count("--steps\n3\n") == 1
    for nnodes, node_rank, is_host in [("2", "0", 1), ("2", "1", 0), ("10", "9", 0), ("1:2", "5", 0)]:
        hosts = {**TWO_HOSTS, "NNODES": nnodes, "NODE_RANK": node_rank}
        code, printed, errors = start("torchrun", **hosts, NPROC_PER_NODE="8", LOCAL_ADDR="10.0.0.2", JOIN_TIMEOUT="20")
        assert (code, errors) == (0, "")
        assert f"--nnodes\n{nnodes}\n" in printed and "--nproc-per-node\n8\n" in printed
        assert f"is_host={is_host},join_timeout=20\n" in printed and "--local-addr\n10.0.0.2\n" in printed
    code, printed, errors = start("torchrun", NNODES="2", NODE_RANK="0")
    assert code != 0 and printed == "" and "MASTER_ADDR: set it" in errors


def test_mpirun_starts_what_was_asked_for(start: Start) -> None:
    code, printed, errors = start("mpirun", NPROC_PER_NODE="8", HOSTS="node0,node1", MPIRUN_FLAGS="-a  -b")
    assert (code, errors) == (0, "")
    assert printed.startswith("-a\n-b\n-n\n16\n-hosts\nnode0,node1\n-ppn\n8\n")


def test_deepspeed_starts_what_was_asked_for(start: Start) -> None:
    code, printed, errors = start("deepspeed", NPROC_PER_NODE="2", MASTER_PORT="29501", NODE_RANK="0")
    assert (code, errors) == (0, "")
    assert "--num_gpus\n2\n--master_port\n29501\n" in printed
    code, printed, errors = start("deepspeed", HOSTFILE="HOSTFILE", NODE_RANK="1", MASTER_ADDR="node0")
    assert (code, errors) == (0, "")
    assert "--master_addr\nnode0\n--no_ssh\n--node_rank\n1\n" in printed


def test_slurm_requeues_as_often_as_was_asked_for(start: Start) -> None:
    for restarts, most, requeued in [("", "", True), ("0", "1", True), ("9", "10", True), ("3", "", False)]:
        code, printed, errors = start("slurm", SLURM_RESTART_COUNT=restarts, MAX_REQUEUES=most, STUB_CODE="1")
        assert code == 1 and errors == ""
        assert ("requeue\n7\n" in printed) == requeued


def test_slurm_makes_a_secret_for_each_start_unless_there_is_one(start: Start) -> None:
    secrets = [start("slurm")[1].rsplit("secret=", 1)[1].strip() for _ in range(2)]
    assert all(len(secret) == 64 for secret in secrets) and secrets[0] != secrets[1]
    assert "secret=mine" in start("slurm", PPSF_SECRET="mine")[1]
