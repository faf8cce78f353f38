"""fp16 and its loss scale, weights in bf16 alone, and gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppsf_dist import ProdigyPlusScheduleFree
from tests.deepspeed.engines import (
    GivenGradients,
    config,
    deepspeed_on_cpu,
    feed,
    full_weights,
    gradients_for,
    make_engine,
    make_groups,
    numbers,
    run_engine,
)
from tests.deepspeed.references import SHAPES, STEPS, check, single_without
from tests.harness.models import D0, initial_weights
from tests.harness.pool import run
from tests.runs import Run

pytestmark = pytest.mark.deepspeed


def run_unguarded() -> tuple[list[Run], dict[str, Tensor], dict[str, Tensor], int]:
    """DeepSpeed does not look for overflow; a gradient of the second group is not finite."""
    settings = config(1, torch.bfloat16)
    settings["bf16"]["check_grad_overflow"] = False
    engine = make_engine(SHAPES, settings, dtype=torch.bfloat16, groups=2)
    first, second = gradients_for(SHAPES, 2, torch.bfloat16)
    feed(engine, first)
    before, weights = numbers(engine.basic_optimizer), full_weights(engine)
    second["tall"][0, 0] = math.nan
    feed(engine, second)
    after = numbers(engine.basic_optimizer)
    result = [Run({}, {}, {}, [before]), Run({}, {}, {}, [after])], weights, full_weights(engine), engine.skipped_steps
    engine.destroy()
    return result


def test_without_deepspeeds_guard_d_and_the_group_stay_as_they_were() -> None:
    for (before, after), weights, later, skipped_by_deepspeed in run(2, run_unguarded):
        assert skipped_by_deepspeed == 0
        for old, new in zip(before.groups[0], after.groups[0], strict=True):
            assert new == {**old, "skipped_steps": 1}
        assert torch.equal(weights["tall"], later["tall"])
        assert all(bool(value.isfinite().all()) for value in later.values())


def run_in_fp16(stage: int, overflow_at: int) -> tuple[Run, int]:
    """With a dynamic loss scale that one step makes overflow."""
    deepspeed_on_cpu()
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        # DeepSpeed refuses fp16 on a CPU, which can do it all the same.
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        # DeepSpeed (0.19) divides by the new scale in a step that raises it, so here it is never raised.
        fp16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 1000}}
        engine = make_engine(SHAPES, config(stage) | fp16, dtype=torch.float16, groups=2)
        run_ = Run({}, {}, {})
        for step, gradients in enumerate(gradients_for(SHAPES, STEPS, torch.float16)):
            if step == overflow_at:
                gradients = {name: gradient * 1e5 for name, gradient in gradients.items()}
            feed(engine, gradients)
            run_.groups.append(numbers(engine.basic_optimizer))
        run_.weights = full_weights(engine)
        skipped: int = engine.skipped_steps
        engine.destroy()
    return run_, skipped


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_with_a_dynamic_loss_scale(stage: int, ranks: int) -> None:
    results = run(ranks, run_in_fp16, stage, 4)
    assert [skipped for _, skipped in results] == [1] * ranks
    check([run_ for run_, _ in results], single_without(torch.float16, skip=4))


MASTERS_IN_BF16 = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_in_bf16_alone(stage: int) -> None:
    """No fp32 weights anywhere: stochastic rounding draws the same bits as in one process."""
    settings = config(stage) | MASTERS_IN_BF16
    runs = run(2, run_engine, SHAPES, STEPS, settings, dtype=torch.bfloat16, groups=2, through_model=True)
    model = GivenGradients(initial_weights(SHAPES, dtype=torch.bfloat16)).bfloat16()
    optimizer = ProdigyPlusScheduleFree(make_groups(model, 2), d0=D0)
    for gradients in gradients_for(SHAPES, STEPS, torch.bfloat16):
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.get_d()
    for run_ in runs:
        for ours, theirs in zip(run_.groups[-1], optimizer.param_groups, strict=True):
            assert ours["k"] == theirs["k"] == STEPS + 1
            assert ours["d"] == pytest.approx(theirs["d"], rel=1e-6)
        differing = total = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                differing += int((run_.weights[name] != parameter).sum())
                total += parameter.numel()
        assert differing <= total / 1000
