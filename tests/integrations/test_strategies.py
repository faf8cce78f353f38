"""Lightning's strategies on two ranks: what is validated and saved is the average, and resumed runs are exact.

DeepSpeed is the real one; Lightning allows it on CUDA alone, so its strategy is told otherwise (stage 2).
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

from tests.bootstrap.launchers import ROOT

CASES = [
    ("ddp", "in training"),
    ("shards", "in training"),
    ("shards", "at validations"),
    ("one file", "at validations"),
    pytest.param("deepspeed", "in training", marks=pytest.mark.deepspeed),
    pytest.param("deepspeed", "at validations", marks=pytest.mark.deepspeed),
]


@functools.cache
def found(kind: str, trigger: str) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, "-m", "tests.integrations.strategies", kind, trigger, folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return result


@pytest.mark.launch
@pytest.mark.parametrize(("kind", "trigger"), CASES)
def test_what_is_saved_is_the_average_and_a_resumed_run_is_exact(kind: str, trigger: str) -> None:
    result, expected = found(kind, trigger), found("ddp", "in training")
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert abs(result["averages"][1] - result["losses"][4]) > 1e-3, "the test needs an average that is not y"
    assert result["saved"] == [result["averages"][1]], "the checkpoint of step 4 validates as step 4 did"
    assert set(result.get("after", result["averages"][2:])) == {result["averages"][2]}
    assert result["resumed"] == result["losses"][4:] and result["again"] == result["averages"][2:]
