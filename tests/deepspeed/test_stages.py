"""Every ZeRO stage gives the run of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.deepspeed.engines import config, count_in_steps, feed, gradients_for, make_engine, run_engine
from tests.deepspeed.references import SHAPES, STEPS, UNSTABLE, check, single
from tests.harness.pool import run
from tests.runs import difference, twice
from tests.switches import EVERY

pytestmark = pytest.mark.deepspeed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Stage 1 with gradients accumulated in fp32: DeepSpeed then takes another class, BF16_Optimizer.
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage(stage: int, dtype: str, ranks: int) -> None:
    settings = config(stage, DTYPES[dtype])
    runs = run(ranks, run_engine, SHAPES, STEPS, settings, dtype=DTYPES[dtype], groups=2)
    check(runs, single(dtype=DTYPES[dtype]))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bf16_optimizer(ranks: int) -> None:
    settings = config(1, torch.bfloat16) | BF16_OPTIMIZER
    runs = run(ranks, run_engine, SHAPES, STEPS, settings, dtype=torch.bfloat16, groups=2)
    check(runs, single(dtype=torch.bfloat16))


VARIANTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "round_robin_2": (2, {"round_robin_gradients": True}, {"through_model": True}),
    "alignment_2": (2, {"parameter_alignment": True}, {}),
    "round_robin_alignment_2": (2, {"round_robin_gradients": True, "parameter_alignment": True},
                                {"through_model": True}),
    "sub_groups_3": (3, {"sub_group_size": 1000}, {}),
    "one_sub_group_each_3": (3, {"sub_group_size": 1}, {}),
    "zero_init_3": (3, {}, {"zero_init": True}),
    "zero_init_sub_groups_3": (3, {"sub_group_size": 1000}, {"zero_init": True}),
    "secondary_partition_3": (3, {"zero_hpz_partition_size": 2}, {}),
    "persistent_3": (3, {"stage3_param_persistence_threshold": 2000}, {}),
    "offload_1": (1, {"offload_optimizer": {"device": "cpu"}}, {}),
    "offload_2": (2, {"offload_optimizer": {"device": "cpu"}}, {}),
    "offload_3": (3, {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 1000}, {}),
    "offload_all_3": (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, {}),
    "no_overlap_2": (2, {"overlap_comm": False, "contiguous_gradients": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_of_zero(variant: str) -> None:
    stage, zero, kwargs = VARIANTS[variant]
    check(run(4, run_engine, SHAPES, STEPS, config(stage, **zero), groups=2, **kwargs), single())


@pytest.mark.parametrize("stage", [1, 3])
def test_autocast(stage: int) -> None:
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    check(run(2, run_engine, SHAPES, STEPS, config(stage) | autocast, groups=2), single())


@pytest.mark.parametrize("stage", [1, 3])
def test_one_group_and_three(stage: int) -> None:
    for groups in (1, 3):
        runs = run(2, run_engine, SHAPES, STEPS, config(stage), groups=groups)
        check(runs, single(groups=groups))


@pytest.mark.parametrize("position,switch", list(enumerate(EVERY)), ids=list(EVERY))
def test_every_switch(position: int, switch: str) -> None:
    stage = (1, 3)[position % 2]
    sub_groups: dict[str, Any] = {"sub_group_size": 1000} if stage == 3 else {}
    settings = config(stage, **sub_groups)
    runs = run(2, run_engine, SHAPES, STEPS, settings, groups=2, **EVERY[switch])
    reference = single(switch)
    allowed = None
    if switch in UNSTABLE:
        noise = difference(single(switch, noisy=True), reference)
        allowed = twice(noise, most=UNSTABLE[switch])
    check(runs, reference, allowed)


@pytest.mark.parametrize("stage", [1, 3])
def test_d_over_many_steps(stage: int) -> None:
    reference = single(steps=40)
    assert reference.numbers("d")[-1][0] > 10 * reference.numbers("d")[0][0], "the test needs a d that moves"
    check(run(2, run_engine, SHAPES, 40, config(stage), groups=2), reference)


def reductions_of_calls(settings: dict[str, Any], groups: int) -> list[int]:
    """Collectives of each call of step() in the third step."""
    engine = make_engine(SHAPES, settings, groups=groups)
    counted = count_in_steps(engine.basic_optimizer)
    for gradients in gradients_for(SHAPES, 3, torch.float32):
        counted.clear()
        feed(engine, gradients)
    engine.destroy()
    return [collectives.total for collectives in counted]


@pytest.mark.parametrize("stage,groups,calls", [(1, 1, 1), (2, 2, 2), (3, 2, 2)])
def test_reductions_of_a_call(stage: int, groups: int, calls: int) -> None:
    assert run(2, reductions_of_calls, config(stage), groups) == [[2] * calls] * 2
