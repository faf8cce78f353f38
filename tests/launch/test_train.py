"""launch/train.py as a person runs it: real processes, real text, a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.image import imread

pytestmark = pytest.mark.launch

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
PLAIN = [sys.executable]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = "--dim 16 --layers 2 --heads 2 --seq-len 16 --batch-size 4 --eval-every 3".split()
STEPS = 6
HALF = 3
# What two summation orders of one batch may differ by after a few steps.
SAME_LOSS = 1e-5


def run(launcher: list[str], *options: str, expect: int = 0) -> str:
    """Runs train.py and returns all that it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, TRAIN, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of an uninterrupted run in one process, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "single"
    return output, run(PLAIN, *TINY, "--steps", str(STEPS), "--output", str(output))


def test_records_every_step_and_says_what_came_out(single: tuple[Path, str]) -> None:
    output, printed = single
    rows = metrics(output)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "val_loss" in row] == [HALF, STEPS]
    assert rows[-1]["d"] > rows[0]["d"]
    assert all(row["tokens_per_second"] > 0 and row["effective_lr"] > 0 for row in rows)
    about = json.loads((output / "run.json").read_text())
    assert 2.5 < about["unigram_entropy"] < 4.0
    for expected in (f"{rows[-1]['val_loss']:.4f}", f"{about['unigram_entropy']:.4f}", str(output / "training.png")):
        assert expected in printed


def test_draws_a_picture_with_both_curves(single: tuple[Path, str]) -> None:
    picture = imread(single[0] / "training.png")
    height, width, _ = picture.shape
    assert width > height > 600
    # White paper with ink on both panels.
    for panel in (picture[: height // 2, :, :3], picture[height // 2 :, :, :3]):
        inked = (panel < 0.9).any(axis=2).mean()
        assert 0.01 < inked < 0.3


def test_two_fsdp_ranks_have_the_losses_of_one_process(single: tuple[Path, str], tmp_path: Path) -> None:
    run(TWO_RANKS, *TINY, "--strategy", "fsdp", "--steps", str(STEPS), "--output", str(tmp_path))
    alone, sharded = metrics(single[0]), metrics(tmp_path)
    for name in ("loss", "val_loss"):
        expected = [row[name] for row in alone if name in row]
        assert [row[name] for row in sharded if name in row] == pytest.approx(expected, abs=SAME_LOSS, rel=0)
    assert [row["d"] for row in sharded] == pytest.approx([row["d"] for row in alone], rel=1e-6)


def test_resume_equals_the_uninterrupted_run(single: tuple[Path, str], tmp_path: Path) -> None:
    run(PLAIN, *TINY, "--steps", str(HALF), "--output", str(tmp_path))
    run(PLAIN, *TINY, "--steps", str(STEPS), "--output", str(tmp_path), "--resume")
    for name in ("step", "loss", "d", "effective_lr", "val_loss"):
        assert [row.get(name) for row in metrics(tmp_path)] == [row.get(name) for row in metrics(single[0])]


def test_a_signal_to_one_rank_saves_on_all_and_prints_the_command_that_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = start_two_ranks(*TINY, "--steps", "1000000", "--eval-every", "1000000", "--output", str(output))
    try:
        wait_until(lambda: (output / "metrics.jsonl").exists() and len(metrics(output)) >= 2, ranks)
        ranks[1].send_signal(signal.SIGINT)
        printed = [rank.communicate()[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGINT] * 2, printed
    stopped = int(metrics(output)[-1]["step"])
    assert f"SIGINT: saved step {stopped} in {output / 'checkpoint'}" in printed[0]
    command = next(line for line in printed[0].splitlines() if line.endswith("--resume"))
    assert shlex.split(command)[: len(TWO_RANKS)] == TWO_RANKS
    subprocess.run([*shlex.split(command), "--steps", str(stopped + 1)], check=True)
    assert [row["step"] for row in metrics(output)] == list(range(1, stopped + 2))


def test_a_batch_that_does_not_divide_is_refused_on_every_rank(tmp_path: Path) -> None:
    ranks = start_two_ranks(*TINY, "--batch-size", "3", "--output", str(tmp_path / "run"))
    printed = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], printed
    assert "--batch-size 3 does not divide over 2 ranks" in printed[0]
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_unasked(single: tuple[Path, str]) -> None:
    before = (single[0] / "metrics.jsonl").read_bytes()
    assert "holds a run already" in run(PLAIN, *TINY, "--output", str(single[0]), expect=2)
    assert (single[0] / "metrics.jsonl").read_bytes() == before


def start_two_ranks(*options: str) -> list[subprocess.Popen[str]]:
    """Starts two ranks as torchrun starts them, so that a test has the process of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    return [
        subprocess.Popen(
            [sys.executable, TRAIN, *options],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait_until(ready: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    """Waits for `ready`, and no longer than all processes live."""
    while not ready():
        assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.1)
