"""Two hosts, and what happens when a part of one is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import (
    ROOT,
    SAME_LOSS,
    STEPS,
    TINY,
    WHY_NOT,
    Host,
    alone,
    children,
    finish,
    metrics,
    possible,
    two_hosts,
    wait_for_step,
)

pytestmark = [pytest.mark.launch, pytest.mark.skipif(not possible(), reason=WHY_NOT)]

SAVED_BEFORE = 8
OPTIONS = [*TINY, "--steps", str(STEPS), "--eval-every", "1", "--save-every", "4"]
# How long the hosts wait for each other at the start, and then for the one that does not come back.
JOIN_SECONDS = 30


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


def check(output: Path, one_process: list[dict[str, float]]) -> None:
    rows = metrics(output)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for name in ("loss", "val_loss"):
        expected = [row[name] for row in one_process]
        assert [row[name] for row in rows] == pytest.approx(expected, abs=SAME_LOSS, rel=0)


def gated(gate: Path) -> dict[str, str]:
    """Variables with which a run waits behind a step that is not saved, until there is a file ``gate``."""
    return {"TRAIN_SCRIPT": str(ROOT / "tests/launch/gated.py"), "PPSF_GATE": f"{SAVED_BEFORE + 1}:{gate}"}


def test_a_killed_worker_starts_again_from_the_last_checkpoint(
    hosts: tuple[Host, Host], one_process: list[dict[str, float]], tmp_path: Path
) -> None:
    # Nothing to resume yet: the option is there for the restart.
    options = [*OPTIONS, "--resume", "--output", str(tmp_path)]
    gate = tmp_path / "gate"
    first, second = (host.start(*options, **gated(gate)) for host in hosts)
    wait_for_step(tmp_path, SAVED_BEFORE + 1, first, second)
    (worker,) = children(second.pid)
    os.kill(worker, signal.SIGKILL)
    stopped_at = metrics(tmp_path)[-1]["step"]
    gate.touch()
    codes, texts = zip(*[finish(process) for process in (first, second)], strict=True)
    assert stopped_at == SAVED_BEFORE + 1
    assert codes == (0, 0), texts
    assert f"failed (exitcode: {-signal.SIGKILL}) local_rank: 0 (pid: {worker})" in texts[1]
    # The bar of the second attempt begins where a checkpoint ends, not at 0.
    assert any(f"| {saved}/{STEPS} [00:00<" in texts[0] for saved in range(SAVED_BEFORE, STEPS, 4)), texts[0]
    check(tmp_path, one_process)


def test_a_lost_host_ends_the_other_which_goes_on_alone(
    hosts: tuple[Host, Host], one_process: list[dict[str, float]], tmp_path: Path
) -> None:
    options = [*OPTIONS, "--output", str(tmp_path)]
    gate = tmp_path / "gate"
    join = {"JOIN_TIMEOUT": str(JOIN_SECONDS)}
    first, second = (host.start(*options, "--resume", **join, **gated(gate)) for host in hosts)
    wait_for_step(tmp_path, SAVED_BEFORE + 1, first, second)
    hosts[1].kill()
    gate.touch()
    code, text = finish(first)
    finish(second)
    assert metrics(tmp_path)[-1]["step"] == SAVED_BEFORE + 1
    assert code != 0
    # The rank names the address that is gone, the agent what it has waited for in vain.
    assert f"[{hosts[1].address}]" in text, text
    assert "RendezvousTimeoutError" in text, text
    # Two ranks have saved, one goes on.
    alone(*options, "--resume")
    check(tmp_path, one_process)
