"""Every class of the package under ZeRO: the run of one process, and its checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppsf_dist.deepspeed import load_checkpoint, save_checkpoint
from tests.deepspeed.engines import config, feed, full_weights, gradients_for, make_engine, model_weights
from tests.harness.models import initial_weights, named_shapes
from tests.harness.pool import run
from tests.rotation import rotated
from tests.runs import Run, check_same, make_other

pytestmark = pytest.mark.deepspeed
STEPS = 6
SHAPES = named_shapes("small")
CLASSES: dict[str, dict[str, Any]] = {
    "SGDScheduleFree": {"lr": 0.1, "weight_decay": 0.1, "warmup_steps": 3},
    "AdamWScheduleFree": {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 3},
    "RAdamScheduleFree": {"lr": 0.01, "betas": (0.9, 0.99), "silent_sgd_phase": False},
    "Prodigy": {"d0": 1e-4, "weight_decay": 0.1, "use_bias_correction": True},
}


@functools.cache
def single(name: str) -> Run:
    start = initial_weights(SHAPES)
    parameters = {key: nn.Parameter(value.clone()) for key, value in start.items()}
    optimizer = make_other(name, parameters, 2, **CLASSES[name])
    for gradients in gradients_for(SHAPES, STEPS, torch.float32):
        for key, parameter in parameters.items():
            parameter.grad = gradients[key]
        optimizer.step()
    numbers = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return Run(start, {key: parameter.detach() for key, parameter in parameters.items()}, {}, [numbers])


def engine_of(name: str, stage: int) -> Any:
    sub_groups: dict[str, Any] = {"sub_group_size": 1000} if stage == 3 else {}
    settings = config(stage, **sub_groups) | {"optimizer": {"type": name, "params": CLASSES[name]}}
    return make_engine(SHAPES, settings, groups=2, named=True)


def train(engine: Any, first: int, last: int) -> None:
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, torch.float32)):
        if first <= step < last:
            feed(engine, gradients)


def outcome(engine: Any) -> Run:
    optimizer = engine.basic_optimizer
    assert optimizer.skipped_steps == 0
    numbers = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    left = Run({}, full_weights(engine), {}, [numbers])
    engine.destroy()
    return left


def in_halves(name: str, stage: int, folder: Path, portable: bool) -> Run:
    """A run that stops in the middle, and goes on in a new engine."""
    engine = engine_of(name, stage)
    train(engine, 0, 3)
    if portable:
        save_checkpoint(folder, engine)
    else:
        engine.save_checkpoint(str(folder), tag="half")
    engine.destroy()
    engine = engine_of(name, stage)
    if portable:
        load_checkpoint(folder, engine)
    else:
        engine.load_checkpoint(str(folder), tag="half")
    train(engine, 3, STEPS)
    return outcome(engine)


def whole(name: str, stage: int) -> Run:
    engine = engine_of(name, stage)
    train(engine, 0, STEPS)
    return outcome(engine)


def check(runs: list[Run], name: str) -> None:
    for left in runs:
        check_same(left, single(name))


@pytest.mark.parametrize(("name", "stage"), rotated(CLASSES, [0, 1, 2, 3]))
def test_every_stage(name: str, stage: int) -> None:
    check(run(2, whole, name, stage), name)


def computes_with(name: str, stage: int) -> tuple[Run, Run]:
    """Weights in bf16 of the model, and those in fp32 that they are a copy of."""
    sub_groups: dict[str, Any] = {"sub_group_size": 1000} if stage == 3 else {}
    settings = config(stage, torch.bfloat16, **sub_groups) | {"optimizer": {"type": name, "params": CLASSES[name]}}
    engine = make_engine(SHAPES, settings, dtype=torch.bfloat16, groups=2, named=True)
    for gradients in gradients_for(SHAPES, STEPS, torch.bfloat16):
        feed(engine, gradients)
    model, optimizer = model_weights(engine), full_weights(engine)
    engine.destroy()
    return Run({}, model, {}), Run(initial_weights(SHAPES, dtype=torch.bfloat16), optimizer, {})


@pytest.mark.parametrize(("name", "stage"), rotated(CLASSES, [1, 2, 3], rounds=1))
def test_the_model_computes_with_what_every_group_has_written(name: str, stage: int) -> None:
    """Also of groups that are written after DeepSpeed has made its copy, for d comes from the last of them."""
    for model, optimizer in run(2, computes_with, name, stage):
        for key, weights in optimizer.weights.items():
            assert not torch.equal(weights, optimizer.start[key].float())
            assert torch.equal(model.weights[key], weights.to(torch.bfloat16)), key


@pytest.mark.parametrize(("name", "saved"), rotated(CLASSES, [(1, False), (1, True), (3, False), (3, True)], rounds=1))
def test_a_run_goes_on_from_its_checkpoint(name: str, saved: tuple[int, bool], tmp_path: Path) -> None:
    """By stage, and whether it is saved in our form or DeepSpeed's."""
    stage, portable = saved
    check(run(2, in_halves, name, stage, tmp_path, portable), name)
