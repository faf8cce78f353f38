"""What surrounds a step in a training run: accumulation, clipping, overflow, schedules, groups, experts, padding."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from tests.deepspeed.engines import (
    GivenGradients,
    config,
    deepspeed_on_cpu,
    feed,
    full_weights,
    gradients_for,
    make_engine,
    make_groups,
    model_weights,
    numbers,
    run_engine,
)
from tests.deepspeed.experts import run_mixture, single_mixture
from tests.deepspeed.references import SHAPES, STEPS, check, single, single_without
from tests.harness.models import D0, initial_weights
from tests.harness.pool import run
from tests.runs import Run, make_optimizer

pytestmark = pytest.mark.deepspeed
STAGES = [0, 1, 2, 3]


def closed_run(change: Any, *, groups: int = 2, **switches: Any) -> Run:
    """One process whose gradients or groups are changed before each step by ``change(step, parameters, optimizer)``."""
    start = initial_weights(SHAPES)
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make_optimizer(parameters, groups, **switches)
    run_ = Run(start, {}, {})
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, torch.float32)):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        if change(step, parameters, optimizer) is not False:
            optimizer.step()
        run_.groups.append(numbers(optimizer))
    run_.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return run_


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_accumulation(stage: int) -> None:
    settings = config(stage) | {"gradient_accumulation_steps": 2}
    runs = run(2, run_engine, SHAPES, STEPS, settings, groups=2, micro_steps=2)
    check(runs, single())


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_clipping(stage: int) -> None:
    largest = 0.1

    def clip(step: int, parameters: dict[str, nn.Parameter], optimizer: Any) -> None:
        norm = nn.utils.clip_grad_norm_(parameters.values(), largest)
        assert norm > 2 * largest, "the test needs gradients that are clipped"

    runs = run(2, run_engine, SHAPES, STEPS, config(stage) | {"gradient_clipping": largest}, groups=2)
    check(runs, closed_run(clip))


def run_with_infinity(settings: dict[str, Any], dtype: torch.dtype, at: int) -> tuple[Run, int]:
    """One step in the run has an infinite gradient element, which only the last rank sees before reduction."""
    engine = make_engine(SHAPES, settings, dtype=dtype, groups=2)
    run_ = Run({}, {}, {})
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, dtype)):
        if step == at:
            gradients["tall"][0, 0] = math.inf
        feed(engine, gradients)
        run_.groups.append(numbers(engine.basic_optimizer))
    run_.weights = full_weights(engine)
    skipped = engine.skipped_steps + engine.basic_optimizer.skipped_steps
    engine.destroy()
    return run_, skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_changes_nothing_anywhere(stage: int, dtype: torch.dtype) -> None:
    results = run(2, run_with_infinity, config(stage, dtype), dtype, 3)
    assert [skipped for _, skipped in results] == [1, 1]
    reference = single_without(dtype, skip=3)
    runs = [run_ for run_, _ in results]
    for run_ in [*runs, reference]:
        for groups in run_.groups:
            for group in groups:
                # Whether DeepSpeed or the optimizer has noticed it is no matter.
                group["skipped_steps"] = 0
    check(runs, reference)


@pytest.mark.parametrize("stage", STAGES)
def test_a_schedule_in_the_config(stage: int) -> None:
    warmup = 4
    settings = config(stage) | {
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1.0, "warmup_num_steps": warmup, "warmup_type": "linear"},
        }
    }

    def schedule(step: int, parameters: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, max(0, step - 1) / warmup)

    check(run(2, run_engine, SHAPES, STEPS, settings, groups=2), closed_run(schedule))


def run_own_optimizer(settings: dict[str, Any], callable_: bool) -> Run:
    """The optimizer is given to DeepSpeed; its groups have arguments of their own."""
    deepspeed = deepspeed_on_cpu()
    model = GivenGradients(initial_weights(SHAPES))

    def make(params: Any = None) -> ProdigyPlusScheduleFree:
        groups = make_groups(model, 2)
        groups[1] |= {"weight_decay": 0.1, "betas": [0.95, 0.99], "lr": 0.5}
        return ProdigyPlusScheduleFree(groups, d0=D0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=model, optimizer=make if callable_ else make(), config=settings)
    run_ = Run({}, {}, {})
    for gradients in gradients_for(SHAPES, STEPS, torch.float32):
        feed(engine, gradients)
        run_.groups.append(numbers(engine.basic_optimizer))
    run_.weights = full_weights(engine)
    engine.destroy()
    return run_


@pytest.mark.parametrize("callable_", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_of_ones_own_with_different_groups(stage: int, callable_: bool) -> None:
    def arguments(step: int, parameters: Any, optimizer: Any) -> None:
        optimizer.param_groups[1].update(weight_decay=0.1, betas=(0.95, 0.99), lr=0.5)

    check(run(2, run_own_optimizer, config(stage), callable_), closed_run(arguments))


def run_with_poison() -> Run:
    """Padding of stage 3 is what memory held: here it is NaN."""
    engine = make_engine(SHAPES, config(3, sub_group_size=1000), groups=2)
    zero = engine.optimizer
    poisoned = 0
    for params in zero.fp16_groups:
        for param in params:
            sub_group, at, padded = zero.grad_position[param.ds_id]
            start = torch.distributed.get_rank() * padded
            real = max(0, min(padded, param.ds_numel - start))
            zero.fp32_partitioned_groups_flat[sub_group].data[at + real : at + padded] = math.nan
            poisoned += padded - real
    run_ = Run({}, {}, {})
    for gradients in gradients_for(SHAPES, STEPS, torch.float32):
        feed(engine, gradients)
        run_.groups.append(numbers(engine.basic_optimizer))
    run_.weights = full_weights(engine)
    run_.collectives = poisoned
    engine.destroy()
    return run_


def test_padding_is_never_read() -> None:
    runs = run(4, run_with_poison)
    assert sum(r.collectives for r in runs) > 0, "the test needs padding"
    check(runs, single())


def run_with_holes(stage: int) -> Run:
    engine = make_engine(SHAPES, config(stage), groups=2)
    run_ = Run({}, {}, {})
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, torch.float32)):
        holes: dict[str, Tensor | None] = {n: None if missing(step, n) else g for n, g in gradients.items()}
        feed(engine, holes)
        run_.groups.append(numbers(engine.basic_optimizer))
    run_.weights = full_weights(engine)
    engine.destroy()
    return run_


def missing(step: int, name: str) -> bool:
    return (name == "wide" and step < 3) or (name == "vector" and step in (4, 5))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_missing_gradient_is_a_zero_gradient(stage: int) -> None:
    """ZeRO puts zeros in its place, so it cannot be told apart; stage 3 repeats the last gradient (docs)."""

    def zeros(step: int, parameters: dict[str, nn.Parameter], optimizer: Any) -> None:
        for name, parameter in parameters.items():
            if missing(step, name):
                parameter.grad = torch.zeros_like(parameter)

    check(run(2, run_with_holes, stage), closed_run(zeros))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts(stage: int, dtype: torch.dtype) -> None:
    """Two experts on four ranks: each rank holds one of them, and all ranks have the same d."""
    runs = run(4, run_mixture, STEPS, config(stage, dtype), dtype)
    reference = single_mixture(STEPS, dtype)
    for run_ in runs:
        assert [[g["d"] for g in groups] for groups in run_.groups] == runs[0].numbers("d")
        mine = Run(reference.start, {name: reference.weights[name] for name in run_.weights}, {}, reference.groups)
        check([run_], mine)


def averages_of_a_run(stage: int, offloads: bool) -> dict[str, Tensor]:
    """The averaged weights after a run in which states leave the device and come back between steps, or do not."""
    engine = make_engine(SHAPES, config(stage), groups=2)
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, torch.float32)):
        if offloads and step in (2, 5):
            engine.offload_states()
            # On a CPU they would stay the same tensors.
            for entry in engine.basic_optimizer.state.values():
                entry.update({name: v.clone() for name, v in entry.items() if isinstance(v, Tensor)})
            engine.reload_states()
        feed(engine, gradients)
    with averaged(engine.optimizer, engine):
        weights = model_weights(engine)
    engine.destroy()
    return weights


@pytest.mark.parametrize("stage", [1, 2])
def test_states_may_be_offloaded_between_steps(stage: int) -> None:
    expected = run(2, averages_of_a_run, stage, False)[0]
    for weights in run(2, averages_of_a_run, stage, True):
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
