"""Accelerate and Hugging Face's Trainer around an engine (accelerate #4159): what they evaluate is the average.

On a CPU Accelerate takes every process of a DeepSpeed job for the only one. Trainer gathers its losses over all, so
it runs on one rank here.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.trainers import NO_DEEPSPEED, STAGES

pytestmark = [pytest.mark.deepspeed, pytest.mark.launch]
ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def results(kind: str, ranks: int) -> dict[int, dict[str, Any]]:
    """What came out at each stage."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [*launcher, "-m", "tests.deepspeed.trainers", kind, str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return {int(stage): result for stage, result in json.loads(file.read_text()).items()}


@pytest.mark.parametrize("stage", STAGES)
def test_accelerates_optimizer_switches_what_the_model_computes(stage: int) -> None:
    result = results("accelerate", 2)[stage]
    assert result["ranks"] == 2 and result["wrapper"] == "DeepSpeedOptimizerWrapper"
    assert abs(result["eval"] - result["y"]) > 1e-3 * result["y"], "the test needs an average that is not y"
    assert result["averaged"] == result["eval"]
    assert result["train"] == result["after"] == result["y"]
    assert result["loaded"] == result["y"] and result["resumed"] == result["more"] < result["y"]
    # The weights are bf16, which the stages round alike.
    assert result == results("accelerate", 2)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_trainer_evaluates_the_average(stage: int) -> None:
    result, expected = (results("trainer", 1)[s] for s in (stage, NO_DEEPSPEED))
    assert result["wrapper"] == "DeepSpeedOptimizerWrapper" != expected["wrapper"]
    assert result["optimizer"] == expected["optimizer"] == "ProdigyPlusScheduleFree"
    assert abs(expected["eval"][-1] - expected["y"]) > 1e-3 * expected["y"], "the test needs an average that is not y"
    assert result["eval"] == pytest.approx(expected["eval"], rel=1e-6)
    assert result["saved"] == pytest.approx(result["eval"][0], rel=1e-6), "what is saved is what was evaluated"
    assert result["resumed"] == result["eval"]
    assert result["d"] == pytest.approx(expected["d"], rel=1e-6) and result["d"][-1] > result["d"][0]
    assert result["y"] == pytest.approx(expected["y"], rel=1e-6)


def test_an_optimizer_that_trainer_ignores_is_noticed() -> None:
    said = results("ignored", 1)[1]["error"]
    assert "the optimizer that trains is a" in said and "Trainer ignores optimizers=" in said
