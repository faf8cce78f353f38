"""What the environment says, in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch has it, its stubs do not

from ppsf_dist.bootstrap import init_process_group, meeting, mpi, place, process, slurm
from tests.bootstrap.launchers import FOREIGN, listener

# Rank 0 of a step of three on one host.
SLURM = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment that no launcher has touched, before and after."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    monkeypatch.setattr(process, "_info", None)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_python_alone_gets_a_group_of_one() -> None:
    info = init_process_group()
    assert (info.rank, info.world_size, info.launcher) == (0, 1, "python")
    assert dist.get_world_size() == 1
    assert init_process_group() is info


def test_group_can_be_started_again() -> None:
    first = init_process_group()
    dist.destroy_process_group()
    assert init_process_group() == process.ProcessInfo(0, 0, 1, 1, first.device, "env")
    assert dist.get_world_size() == 1


def test_group_of_someone_else_is_taken_over() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    info = init_process_group()
    assert info == process.ProcessInfo(0, 0, 1, 1, torch.device("cpu"), "env")
    assert os.environ["LOCAL_RANK"] == "0"
    assert "MASTER_PORT" not in os.environ


def test_group_of_someone_else_with_a_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, LOCAL_RANK="3", LOCAL_WORLD_SIZE="4", GROUP_RANK="1")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    info = init_process_group()
    assert (info.local_rank, info.local_world_size) == (3, 4)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set_environment(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    del variables[missing]
    set_variables(monkeypatch, **variables)
    pattern = f"{next(iter(variables))}={next(iter(variables.values()))}.* but not {missing}: start .* or unset"
    with pytest.raises(RuntimeError, match=pattern):
        init_process_group()
    assert not dist.is_initialized()


def test_half_set_environment_under_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, WORLD_SIZE="2", PMI_SIZE="2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2 but not RANK, MASTER_ADDR, MASTER_PORT"):
        init_process_group()


@pytest.mark.parametrize(
    ("variables", "pattern"),
    [
        ({"RANK": "x"}, "RANK='x' must be an integer >= 0"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"PMI_SIZE": "4"}, r"WORLD_SIZE=2 .* 4 processes .*\(PMI_SIZE=4\): unset RANK"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"},
            r"WORLD_SIZE=2 .* \(SLURM_STEP_NUM_TASKS=8\): unset RANK",
        ),
    ],
)
def test_contradictions(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], pattern: str) -> None:
    set_variables(monkeypatch, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    set_variables(monkeypatch, **variables)
    with pytest.raises(RuntimeError, match=pattern):
        init_process_group()


def test_port_that_the_launcher_chose_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener() as taken:
        port = taken.getsockname()[1]
        set_variables(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with pytest.raises(RuntimeError, match=f"MASTER_PORT={port} is taken .* choose a free one"):
            init_process_group()


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_without_mpi4py(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    set_variables(monkeypatch, **{variable: "2"})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=rf"\({variable}=2\) but mpi4py cannot be imported: pip install mpi4py"):
        init_process_group()


def test_torchrun_below_mpirun_is_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="x", PMI_SIZE="2")
    with listener() as probe:
        set_variables(monkeypatch, MASTER_PORT=str(probe.getsockname()[1]))
    assert init_process_group().launcher == "torchrun"


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE"),
        # srun --mpi=pmi2
        ({"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, None),
        # MPICH's mpirun with one process on each host of a Slurm job: its daemons are a step of the same size.
        ({"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "MPI_LOCALNRANKS": "1"}, "PMI_SIZE"),
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"}, "PMI_SIZE"),
    ],
)
def test_mpirun_is_told_from_srun(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: str | None
) -> None:
    set_variables(monkeypatch, **variables)
    assert mpi.size_variable() == found


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, True),
        # An interactive shell, and the batch script itself.
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),
    ],
)
def test_slurm_step_is_told_from_a_shell(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: bool
) -> None:
    set_variables(monkeypatch, **variables)
    assert slurm.is_step() == found


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[07-09,12],login", "n07"),
        ("rack[2-3]n[04,06-08]-ib,x", "rack2n04-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist: str, host: str) -> None:
    assert slurm.first_host(nodelist) == host


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n2"),
        ("login,n[07-09,12]", "n12"),
        ("x,rack[2-3]n[04,06-08]-ib", "rack3n08-ib"),
    ],
)
def test_last_host_of_a_slurm_list(nodelist: str, host: str) -> None:
    assert slurm.last_host(nodelist) == host


def test_an_empty_slurm_list() -> None:
    with pytest.raises(RuntimeError, match="SLURM_STEP_NODELIST='' names no host: set MASTER_ADDR"):
        slurm.first_host("")


def test_secret_of_a_slurm_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    set_variables(monkeypatch, **SLURM, PPSF_SECRET="0123456789abcdef")
    keys = {slurm.step_key(0), slurm.step_key(1)}
    assert len(keys) == 1 and not caplog.text
    for change in ({"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"PPSF_SECRET": "0123456789abcdeg"}):
        set_variables(monkeypatch, **change)
        keys.add(slurm.step_key(0))
    assert len(keys) == 4
    monkeypatch.setenv("PPSF_SECRET", "0123456789abcde")
    with pytest.raises(RuntimeError, match="PPSF_SECRET has 15 characters.* allowed are 16 or more") as error:
        init_process_group()
    assert "0123456789" not in str(error.value)


def test_a_slurm_step_without_a_secret_says_who_may_ask(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_variables(monkeypatch, **SLURM)
    assert slurm.step_key(1) == slurm.step_key(2) and not caplog.text
    assert slurm.step_key(0) == slurm.step_key(1)
    assert "PPSF_SECRET is not set: who knows the id of this job can ask" in caplog.text


def test_tasks_on_each_slurm_host() -> None:
    assert [slurm.tasks_on_host("4(x2),3,1(x2)", host) for host in range(5)] == [4, 4, 3, 1, 1]
    with pytest.raises(RuntimeError, match="SLURM_STEP_TASKS_PER_NODE='4' has no host 1"):
        slurm.tasks_on_host("4", 1)


@pytest.mark.parametrize("tasks", ["", "4(x2", "four", "4(x2) 3", "٤"])
def test_tasks_that_slurm_does_not_write(tasks: str) -> None:
    with pytest.raises(RuntimeError, match="SLURM_STEP_TASKS_PER_NODE=.* has no host 0"):
        slurm.tasks_on_host(tasks, 0)


@pytest.mark.parametrize("value", ["", "x", "-1", "+1", "1.0", " 1", "08", "٣", "1\n", "9" * 5000])
def test_what_is_no_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RANK", value)
    with pytest.raises(RuntimeError, match="^RANK(=.* must be an integer >= 0 .*without leading zeros| is not set)"):
        place.integer("RANK")


def test_what_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "7", "999999999"):
        monkeypatch.setenv("RANK", value)
        assert place.integer("RANK") == int(value)


@pytest.mark.parametrize("port", ["65536", "-1", "029500"])
@pytest.mark.parametrize("launcher", [{"RANK": "0", "WORLD_SIZE": "1"}, SLURM])
def test_what_is_no_port(monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], port: str) -> None:
    set_variables(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **launcher)
    with pytest.raises(RuntimeError, match=f"MASTER_PORT='{port}' must be an integer >= 0 and <= 65535"):
        init_process_group()


def test_slurm_step_of_which_a_rank_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **SLURM)
    # The store itself has all the time that it needs; only the wait for the others ends soon.
    monkeypatch.setattr(slurm, "open_store", lambda a, p, n, _: meeting.open_store(a, p, n, meeting.DEFAULT_TIMEOUT))
    with pytest.raises(RuntimeError, match=r"Ranks \[1, 2\] did not come within 0:00:00.050000"):
        init_process_group(timeout=timedelta(milliseconds=50))
