"""The same script under every launcher."""

from __future__ import annotations

import re
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ppsf_dist.bootstrap import slurm
from tests.bootstrap import launchers
from tests.bootstrap.launchers import RANKS, Outcome
from tests.bootstrap.worker import EXIT_CODE

pytestmark = pytest.mark.launch

# The sum of rank + 1 over two ranks.
SUM = 3.0


def check_world(outcome: Outcome, launcher: str, hosts: int = 1) -> None:
    assert outcome.code == 0, outcome.text
    assert len(outcome.ranks) == RANKS, outcome.text
    for rank, found in enumerate(outcome.ranks):
        assert found["launcher"] == launcher
        assert (found["rank"], found["world_size"]) == (rank, RANKS)
        assert (found["local_rank"], found["local_world_size"]) == ((rank, RANKS) if hosts == 1 else (0, 1))
        assert found["sum"] == SUM
        assert found["same"]
        environment = found["environment"]
        assert environment["RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == str(RANKS)
        assert environment["LOCAL_RANK"] == str(found["local_rank"])
        assert environment["LOCAL_WORLD_SIZE"] == str(found["local_world_size"])
        assert environment["GROUP_RANK"] == ("0" if hosts == 1 else str(rank))
        assert environment["MASTER_ADDR"] in ("127.0.0.1", "localhost")
        assert environment["MASTER_PORT"] == outcome.ranks[0]["environment"]["MASTER_PORT"]
        assert int(environment["MASTER_PORT"]) > 0


def test_python() -> None:
    outcome = launchers.python()
    assert outcome.code == 0, outcome.text
    (found,) = outcome.ranks
    assert found["launcher"] == "python"
    assert (found["world_size"], found["local_world_size"], found["sum"], found["same"]) == (1, 1, 1.0, True)
    assert {name: found["environment"][name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
    }


def test_torchrun() -> None:
    check_world(launchers.torchrun(), "torchrun")


def test_deepspeed() -> None:
    check_world(launchers.deepspeed(), "deepspeed")


@pytest.mark.parametrize("mpirun", [launchers.mpich, launchers.open_mpi])
def test_mpirun_passes_over_a_port_that_is_taken(mpirun: Callable[..., Outcome]) -> None:
    with launchers.listener() as taken:
        port = taken.getsockname()[1]
        outcome = mpirun(MASTER_PORT=str(port))
    check_world(outcome, "mpirun")
    assert outcome.ranks[0]["environment"]["MASTER_PORT"] != str(port)
    assert f"MASTER_PORT={port} is taken" in outcome.text


def test_mpi_of_the_script_stays_up() -> None:
    outcome = launchers.mpich("mpi")
    check_world(outcome, "mpirun")
    assert [found["mpi_sum"] for found in outcome.ranks] == [SUM, SUM]


def test_srun_passes_over_a_port_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_ID": str(time.time_ns()), "SLURM_STEP_ID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with launchers.listener(slurm.candidate_ports(slurm.step_token())[0]):
        outcome = launchers.slurm(tmp_path)(SLURM_JOB_ID=job["SLURM_JOB_ID"])
    check_world(outcome, "srun", hosts=2)


def test_variables_set_by_hand() -> None:
    with launchers.listener() as probe:
        port = probe.getsockname()[1]
    variables = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(launchers.WORKER)]
    processes = [launchers.start(command, RANK=str(rank), **variables) for rank in range(RANKS)]
    outcomes = [launchers.finish(process) for process in processes]
    text = "".join(outcome.text for outcome in outcomes)
    ranks = [found for outcome in outcomes for found in outcome.ranks]
    check_world(Outcome(max(outcome.code for outcome in outcomes), ranks, text), "env")


@pytest.mark.parametrize("launch", [launchers.torchrun, launchers.mpich, launchers.open_mpi])
def test_traceback_of_a_failing_rank_survives(launch: Callable[..., Outcome]) -> None:
    outcome = launch("raise")
    assert outcome.code != 0
    assert "ValueError: rank 1 fails on purpose" in outcome.text
    assert 'worker.py", line' in outcome.text


@pytest.mark.parametrize("launch", [launchers.mpich, launchers.open_mpi])
def test_exit_code_of_a_failing_rank_survives(launch: Callable[..., Outcome]) -> None:
    outcome = launch("exit")
    assert outcome.code == EXIT_CODE, outcome.text


def test_failed_slurm_job_is_queued_again_and_keeps_its_exit_code(tmp_path: Path) -> None:
    outcome = launchers.slurm(tmp_path)("exit", SLURM_JOB_ID="77")
    assert outcome.code == EXIT_CODE, outcome.text
    assert "scontrol requeue 77" in outcome.text


def test_failed_slurm_job_is_not_queued_again_for_ever(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    outcome = launchers.slurm(tmp_path)(TRAIN_SCRIPT=str(script), SLURM_RESTART_COUNT="3")
    assert outcome.code == EXIT_CODE
    assert "scontrol" not in outcome.text


def test_open_mpi_with_the_library_of_mpich() -> None:
    library = Path(sysconfig.get_path("data")) / "lib/libmpi.so.12"
    outcome = launchers.open_mpi(MPI4PY_LIBMPI=str(library))
    assert outcome.code != 0
    assert re.search(
        r"MPI library that mpi4py loaded \(MPICH.*\) is of another kind .*OMPI_COMM_WORLD_SIZE=2: set MPI4PY_LIBMPI",
        outcome.text,
    ), outcome.text


def test_mpich_with_the_library_of_open_mpi() -> None:
    outcome = launchers.mpich(MPI4PY_LIBMPI=launchers.open_mpi_library())
    assert outcome.code != 0
    assert re.search(r"\(Open MPI.*it sees 1 process\).*PMI_SIZE=2: set MPI4PY_LIBMPI", outcome.text), outcome.text


def test_mpirun_without_an_mpi_library() -> None:
    outcome = launchers.python(PMI_SIZE="2", MPI4PY_LIBMPI="/no/libmpi.so")
    assert outcome.code == 1
    assert "(PMI_SIZE=2) but mpi4py finds no MPI library: set MPI4PY_LIBMPI" in outcome.text
