"""The pool runs jobs on real worlds, survives the ones that fail, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.harness import pool
from tests.harness.pool import JobFailed, run

pytestmark = pytest.mark.dist

SHORT_SECONDS = 1.5


def _rank_and_sum(*, factor: float) -> tuple[int, int, Tensor]:
    total = torch.full((3,), factor)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


def _pid() -> int:
    return os.getpid()


def _echo(value: object) -> object:
    return value


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"planted on {rank}")
    dist.barrier()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)
    dist.barrier()


def _interrupt(pid: int) -> None:
    """Rank 0 hangs, and the last rank, which has its job when all have theirs, presses ctrl-C."""
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(pid, signal.SIGINT)
    time.sleep(1000)


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.abort()
    dist.barrier()


def _fall_out_of_step() -> None:
    if dist.get_rank() == 1:
        dist.broadcast(torch.ones(1), 1, async_op=True)


def _shout() -> None:
    print(f"out of {dist.get_rank()}")
    print(f"error of {dist.get_rank()}", file=sys.stderr)
    os.system("echo child")  # Past Python's own streams.


def _disturb_globals() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.manual_seed(5)


def _globals() -> tuple[torch.dtype, int, float, float, float]:
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        float(torch.rand(())),
        random.random(),
        float(np.random.random()),
    )


def _make_groups(count: int) -> int:
    for _ in range(count):
        dist.new_group([0, 1])
    return os.getpid()


def _dtensor() -> DTensor:
    return distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])


def _view_of_large_storage() -> Tensor:
    return torch.ones(1_000_000).requires_grad_()[:2]


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            try:
                assert wait([process], pool.DEATH_SECONDS), f"process {pid} is still there"
            finally:
                os.close(process)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_a_job_runs_on_every_rank_of_its_world(world_size: int) -> None:
    results = run(world_size, _rank_and_sum, factor=2.0)
    assert [(rank, size) for rank, size, _ in results] == [(rank, world_size) for rank in range(world_size)]
    for _, _, total in results:
        assert torch.equal(total, torch.full((3,), 2.0 * world_size))


def test_ranks_are_processes_that_serve_many_jobs() -> None:
    pids = run(2, _pid)
    assert len({*pids, os.getpid()}) == 3
    assert run(2, _pid) == pids
    assert not set(run(3, _pid)) & set(pids)


def test_the_server_has_one_thread_as_forking_demands() -> None:
    run(2, _pid)
    assert pool._pool._server is not None
    assert len(os.listdir(f"/proc/{pool._pool._server._process.pid}/task")) == 1


def test_every_job_starts_from_the_same_globals() -> None:
    first = run(2, _globals)
    run(2, _disturb_globals)
    assert run(2, _globals) == first
    assert first[0] == first[1]
    assert first[0][:2] == (torch.float32, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_values_travel_unchanged(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype).t()
    sent = {"tensor": tensor, "empty": torch.empty(0, 3, dtype=dtype), "others": [1.5, (tensor.sum(),)]}
    for received in run(2, _echo, sent):
        torch.testing.assert_close(received, sent, rtol=0.0, atol=0.0)


def test_results_are_values_without_descriptors_graph_or_spare_storage() -> None:
    run(2, _pid)
    before = _open_descriptors()
    results = [run(2, _view_of_large_storage)[1] for _ in range(5)]
    assert _open_descriptors() == before
    for result in results:
        assert torch.equal(result, torch.ones(2)) and not result.requires_grad
        assert result.untyped_storage().nbytes() == 8 and not result.untyped_storage().is_shared()


def test_a_dtensor_is_no_result() -> None:
    with pytest.raises(JobFailed, match="A job returned a DTensor.*full_tensor"):
        run(2, _dtensor)


def test_output_of_ranks_is_captured(capsys: pytest.CaptureFixture[str]) -> None:
    run(2, _shout)
    lines = capsys.readouterr().out.splitlines()
    for rank in (0, 1):
        own = [line for line in lines if line.startswith(f"[rank {rank}]")]
        assert own == [f"[rank {rank}] {text}" for text in (f"out of {rank}", f"error of {rank}", "child")]


def test_an_exception_names_its_rank_and_ends_the_world() -> None:
    pids = run(2, _pid)
    with pytest.raises(JobFailed, match="_fail_on failed in a world of 2") as caught:
        run(2, _fail_on, 1)
    assert "ValueError: planted on 1" in caught.value.reports[1] and "in _fail_on" in caught.value.reports[1]
    # The other rank waits for the one that has raised.
    assert "still running" in caught.value.reports[0] and "in barrier" in caught.value.reports[0]
    assert "--- rank 1: Traceback" in str(caught.value)
    _wait_until_gone(pids)
    assert not set(run(2, _pid)) & set(pids)


def test_a_hang_ends_at_the_timeout_and_shows_the_stacks() -> None:
    pids = run(2, _pid)
    with pytest.raises(JobFailed, match=f"_hang_on did not return within {SHORT_SECONDS} s in a world of 2") as caught:
        run(2, _hang_on, 0, timeout=SHORT_SECONDS)
    assert "in _hang_on" in caught.value.reports[0] and "in barrier" not in caught.value.reports[0]
    assert "in barrier" in caught.value.reports[1]
    _wait_until_gone(pids)
    assert [rank for rank, _, _ in run(2, _rank_and_sum, factor=1.0)] == [0, 1]


def test_a_crash_is_reported_with_its_stack() -> None:
    with pytest.raises(JobFailed) as caught:
        run(2, _die_on, 1)
    assert caught.value.reports[1].startswith("died")
    assert "Fatal Python error: Aborted" in caught.value.reports[1] and "in _die_on" in caught.value.reports[1]


def test_a_rank_killed_between_jobs_is_reported_and_replaced() -> None:
    pids = run(2, _pid)
    os.kill(pids[1], signal.SIGKILL)
    _wait_until_gone([pids[1]])
    with pytest.raises(JobFailed) as caught:
        run(2, _pid)
    assert caught.value.reports[1].startswith("died")
    _wait_until_gone(pids)
    assert len(run(2, _pid)) == 2


def test_collectives_out_of_step_fail_the_job_that_issued_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BARRIER_SECONDS", SHORT_SECONDS)
    with pytest.raises(JobFailed, match="barrier after .*_fall_out_of_step .*do all ranks issue the same collectives"):
        run(2, _fall_out_of_step)


def test_a_world_with_many_process_groups_is_replaced() -> None:
    pids = run(2, _make_groups, pool.PROCESS_GROUPS_PER_WORLD // 2)
    assert run(2, _pid) == pids
    run(2, _make_groups, pool.PROCESS_GROUPS_PER_WORLD // 2 + 1)
    assert not set(run(2, _pid)) & set(pids)


def test_an_interrupted_wait_ends_the_world() -> None:
    pids = run(2, _pid)
    # A shell that starts the tests in the background lets them ignore ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        run(2, _interrupt, os.getpid())
    signal.signal(signal.SIGINT, before)
    _wait_until_gone(pids)


@pytest.mark.parametrize("world_size", [0, 9])
def test_impossible_worlds_are_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"world_size is {world_size}; allowed are 1 to 8"):
        run(world_size, _pid)


def test_functions_that_ranks_cannot_import_are_refused() -> None:
    with pytest.raises(ValueError, match="a rank can only import a function at the top level of a module"):
        run(2, lambda: 1)


SCRIPT = """
import os, sys
from tests.harness import pool
# No main guard: a rank that imported this script again would start ranks of its own.
world = pool._pool._world(2)
print(pool._pool._server._process.pid, *pool.run(2, os.getpid), world._directory.parent, flush=True)
{ending}
"""


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os.kill(os.getpid(), 9)"])
def test_nothing_is_left_however_the_tests_end(ending: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(ending=ending))
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr == ""
    *pids, directory = ended.stdout.split()
    assert len(pids) == 3
    _wait_until_gone([int(pid) for pid in pids])
    assert not Path(directory).exists()


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_BOOTSTRAP", "raise SystemExit('planted')")
    with pytest.raises(RuntimeError, match="did not answer. Its stderr:\nplanted"):
        pool.Pool().run(1, _pid)
