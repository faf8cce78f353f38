"""train(), eval() and averaged() reach the weights that the model computes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ppsf_dist import averaged
from tests.deepspeed.engines import config, feed, full_weights, gradients_for, make_engine, model_weights, numbers
from tests.deepspeed.references import SHAPES, STEPS, check, single
from tests.deepspeed.test_stages import BF16_OPTIMIZER
from tests.harness.models import initial_weights
from tests.harness.pool import run
from tests.runs import Run, make_optimizer

pytestmark = pytest.mark.deepspeed
HALF = STEPS // 2
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    **{f"stage_{s}_{d}": (config(s, t), t) for s in range(4) for d, t in (("fp32", torch.float32),
                                                                          ("bf16", torch.bfloat16))},
    "bf16_optimizer": (config(1, torch.bfloat16) | BF16_OPTIMIZER, torch.bfloat16),
    "round_robin": (config(2, round_robin_gradients=True), torch.float32),
    "alignment": (config(2, torch.bfloat16, parameter_alignment=True), torch.bfloat16),
    "sub_groups": (config(3, torch.bfloat16, sub_group_size=1000), torch.bfloat16),
    "persistent": (config(3, torch.bfloat16, stage3_param_persistence_threshold=2000), torch.bfloat16),
    "offload_1": (config(1, torch.bfloat16, offload_optimizer={"device": "cpu"}), torch.bfloat16),
    "offload_3": (config(3, torch.bfloat16, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
                  torch.bfloat16),
}  # fmt: skip


def averages_of_one_process(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averaged weights x after half of the steps and at the end."""
    start = {name: value.float() for name, value in initial_weights(SHAPES, dtype=dtype).items()}
    parameters = {name: torch.nn.Parameter(value) for name, value in start.items()}
    optimizer = make_optimizer(parameters, 2)
    seen = []
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, dtype), start=1):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].float()
        optimizer.step()
        if step in (HALF, STEPS):
            with averaged(optimizer):
                seen.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return seen[0], seen[1]


def run_with_evaluations(settings: dict[str, Any], dtype: torch.dtype, plain: bool) -> tuple[Run, list[Any]]:
    """Evaluate in the middle and at the end. ``plain`` uses eval() and train(), otherwise averaged()."""
    engine = make_engine(SHAPES, settings, dtype=dtype, groups=2)
    optimizer = engine.basic_optimizer
    run_ = Run({}, {}, {})
    seen: list[Any] = []
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, dtype), start=1):
        feed(engine, gradients)
        run_.groups.append(numbers(optimizer))
        if step not in (HALF, STEPS):
            continue
        before = model_weights(engine)
        if plain:
            optimizer.eval()
            seen.append(model_weights(engine))
            optimizer.train()
        else:
            with averaged(engine.optimizer, engine):
                seen.append(model_weights(engine))
        after = model_weights(engine)
        same = all(torch.equal(before[name], value) for name, value in after.items())
        if not plain:
            assert same, "averaged() must leave the model as it found it"
    # In fp32 the model's own weights; DeepSpeed's interface to the others is wrong under round_robin_gradients.
    run_.weights = model_weights(engine) if dtype == torch.float32 else full_weights(engine)
    engine.destroy()
    return run_, seen


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in expected.items():
        tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        scale = float(value.abs().max())
        assert ours[name].dtype == dtype
        worst = float((ours[name].float() - value).abs().max())
        assert worst <= tolerance * max(scale, 1e-3), (name, worst, scale)


@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_with_the_average(case: str) -> None:
    settings, dtype = CASES[case]
    results = run(2, run_with_evaluations, settings, dtype, False)
    middle, end = averages_of_one_process(dtype)
    y = single(dtype=dtype).weights
    assert any(float((end[n] - y[n]).abs().max()) > 0.01 * float(y[n].abs().max()) for n in y), "x and y must differ"
    for _, seen in results:
        assert_close(seen[0], middle, dtype)
        assert_close(seen[1], end, dtype)
    check([run_ for run_, _ in results], single(dtype=dtype))


def step_in_eval_mode(settings: dict[str, Any], dtype: torch.dtype) -> None:
    engine = make_engine(SHAPES, settings, dtype=dtype, groups=2)
    first, second = gradients_for(SHAPES, 2, dtype)
    feed(engine, first)
    engine.basic_optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) after evaluating"):
        feed(engine, second)
    engine.destroy()


@pytest.mark.parametrize("case", ["stage_0_fp32", "stage_0_bf16", "stage_1_bf16", "stage_3_bf16"])
def test_a_step_in_eval_mode_is_an_error(case: str) -> None:
    run(2, step_in_eval_mode, *CASES[case])


@pytest.mark.parametrize("case", ["stage_0_bf16", "stage_1_bf16", "stage_3_bf16"])
def test_eval_and_train_by_hand(case: str) -> None:
    settings, dtype = CASES[case]
    middle, end = averages_of_one_process(dtype)
    for _, seen in run(2, run_with_evaluations, settings, dtype, True):
        assert_close(seen[0], middle, dtype)
        assert_close(seen[1], end, dtype)
