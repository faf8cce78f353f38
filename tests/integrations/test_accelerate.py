"""Accelerate, the real one: plain, DDP and FSDP2 (its DeepSpeed: tests/deepspeed/test_trainers.py)."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from ppsf_dist.integrations.accelerate import check_prepared
from tests.bootstrap.launchers import ROOT
from tests.integrations.accelerating import D0, STEPS, loss_of, make_model

EXAMPLE = ROOT / "examples" / "accelerate_loop.py"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
KINDS = {"plain": ((), "Sequential"), "ddp": (TWO, "DistributedDataParallel"), "fsdp2": (TWO, "FSDPSequential")}


@functools.cache
def found(kind: str) -> dict[str, Any]:
    launcher, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, "-m", "tests.integrations.accelerating", kind, folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return result


@functools.cache
def alone() -> dict[str, Any]:
    """The same without Accelerate, in one process."""
    model = make_model()
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0)

    def train() -> None:
        for _ in range(STEPS):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    train()
    y = loss_of(model).item()
    with averaged(optimizer, model):
        x = loss_of(model).item()
    train()
    return {
        "y": y,
        "x": x,
        "d": optimizer.get_d(),
        "sums": [p.detach().double().sum().item() for p in model.parameters()],
    }


@pytest.mark.launch
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_that_of_one_process_and_both_modes_reach_the_model(kind: str) -> None:
    result, expected = found(kind), alone()
    assert (result["model"], result["wrapper"]) == (KINDS[kind][1], "AcceleratedOptimizer")
    assert result["ranks"] == (1 if kind == "plain" else 2)
    assert abs(expected["x"] - expected["y"]) > 1e-3 * expected["y"], "the test needs an average that is not y"
    assert result["y"] == pytest.approx(expected["y"], rel=1e-5)
    assert result["x"] == pytest.approx(expected["x"], rel=1e-5)
    assert result["eval"] == result["x"]
    assert result["train"] == pytest.approx(result["y"], rel=1e-6)
    if kind != "fsdp2":
        assert result["saved"] == result["x"], "save_model() inside averaged() keeps the average"


@pytest.mark.launch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["training", "average"])
def test_a_state_that_is_loaded_goes_on_as_if_nothing_had_been(kind: str, name: str) -> None:
    """Saved in training, or inside averaged() and back by optimizer.train(): the same run, bit for bit.

    But for the average under FSDP2: there torch loads only what the optimizer has already, y is not among it, and is
    computed, which costs digits.
    """
    result, expected = found(kind), alone()
    (sums, d), (exact, _) = result[f"resumed {name}"], result["resumed training"]
    if (kind, name) == ("fsdp2", "average"):
        assert result[f"loaded {name}"] == pytest.approx(result["y"], rel=1e-6)
        assert sums == pytest.approx(exact, rel=1e-6)
    else:
        assert result[f"loaded {name}"] == result["y"] and sums == exact
    assert d == pytest.approx(expected["d"], rel=1e-5) and sums == pytest.approx(expected["sums"], rel=1e-4, abs=1e-4)


def test_what_does_not_train_as_it_was_meant_is_refused() -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(2, 2)
    ours, theirs = ProdigyPlusScheduleFree(model.parameters()), torch.optim.AdamW(model.parameters())
    scheduler = LambdaLR(ours, lambda _: 1.0)
    model, ours, theirs, scheduler = accelerator.prepare(model, ours, theirs, scheduler)
    check_prepared(model, ours)
    with pytest.raises(TypeError, match="the optimizer that trains is a AdamW, none of ppsf_dist"):
        check_prepared(model, theirs)
    with pytest.raises(TypeError, match="no optimizer is among what was prepared"):
        check_prepared(model)
    with pytest.raises(ValueError, match="a scheduler was prepared"):
        check_prepared(ours, scheduler)
    check_prepared(ours, scheduler, schedule=True)


@pytest.mark.launch
def test_the_example_runs_on_one_rank_and_resumes_on_two(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [str(EXAMPLE), "--output", str(tmp_path), "--epochs", "2"]
    for launcher, more in (((), ()), (TWO, ("--resume",))):
        done = subprocess.run([sys.executable, *launcher, *words, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("loss of the averaged weights") == 1
    assert (tmp_path / "model" / "model.safetensors").exists()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"loss", "d", "d_lr", "d_effective_lr"} <= set(events.Tags()["scalars"])
