"""launch/train.py --strategy deepspeed as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.launch.test_train import HALF, PLAIN, ROOT, SAME_LOSS, STEPS, TINY, TWO_RANKS, metrics
from tests.launch.test_train import run as train

pytestmark = [pytest.mark.deepspeed, pytest.mark.launch]
ZERO = [*TINY, "--strategy", "deepspeed"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("runs") / "single"
    train(PLAIN, *TINY, "--steps", str(STEPS), "--output", str(output))
    return output


def check_same(output: Path, expected: Path) -> None:
    for name in ("loss", "val_loss"):
        theirs = [row[name] for row in metrics(expected) if name in row]
        assert [row[name] for row in metrics(output) if name in row] == pytest.approx(theirs, abs=SAME_LOSS, rel=0)
    ours, theirs = (json.loads((folder / "run.json").read_text())["parameters"] for folder in (output, expected))
    assert ours == theirs > 0
    assert [row["d"] for row in metrics(output)] == pytest.approx([row["d"] for row in metrics(expected)], rel=1e-6)


def test_stage_3_has_the_losses_and_the_picture_of_one_process(single: Path, tmp_path: Path) -> None:
    printed = train(TWO_RANKS, *ZERO, "--steps", str(STEPS), "--output", str(tmp_path))
    check_same(tmp_path, single)
    assert str(tmp_path / "training.png") in printed and "Warning" not in printed
    assert imread(tmp_path / "training.png").shape == imread(single / "training.png").shape


def test_a_run_begins_under_deepspeeds_launcher_and_ends_in_one_process(single: Path, tmp_path: Path) -> None:
    options = [*ZERO, "--zero-stage", "1", "--steps", str(HALF), "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NPROC_PER_NODE": "2"}
    script = str(ROOT / "launch" / "deepspeed.sh")
    subprocess.run([script, *options], env=environment, check=True)
    train(PLAIN, *TINY, "--steps", str(STEPS), "--output", str(tmp_path), "--resume")
    check_same(tmp_path, single)
