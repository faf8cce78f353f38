"""One training under every launcher: the same losses, step for step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bootstrap import launchers
from tests.launch.hosts import SAME_LOSS, TINY, TRAIN, WHY_NOT, finish, metrics, possible, two_hosts

pytestmark = pytest.mark.launch

STEPS = 20
OPTIONS = [*TINY, "--steps", str(STEPS), "--eval-every", str(STEPS), "--check-every", "5"]


def check(output: Path, one_process: list[dict[str, float]]) -> None:
    rows, reference = metrics(output), one_process[:STEPS]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # A training that stands still would be the same everywhere too.
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], abs=SAME_LOSS, rel=0)
    assert rows[-1]["val_loss"] == pytest.approx(reference[-1]["val_loss"], abs=SAME_LOSS, rel=0)
    assert [row["d"] for row in rows] == pytest.approx([row["d"] for row in reference], rel=1e-5)


@pytest.mark.parametrize("launch", [launchers.torchrun, launchers.mpich, launchers.open_mpi, launchers.deepspeed])
def test_two_ranks_under(launch: Any, one_process: list[dict[str, float]], tmp_path: Path) -> None:
    outcome = launch(*OPTIONS, "--output", str(tmp_path), TRAIN_SCRIPT=TRAIN)
    assert outcome.code == 0, outcome.text
    check(tmp_path, one_process)


@pytest.mark.skipif(not possible(), reason=WHY_NOT)
def test_two_hosts(one_process: list[dict[str, float]], tmp_path: Path) -> None:
    with two_hosts() as hosts:
        started = [host.start(*OPTIONS, "--output", str(tmp_path)) for host in hosts]
        for code, text in [finish(process) for process in started]:
            assert code == 0, text
    check(tmp_path, one_process)
