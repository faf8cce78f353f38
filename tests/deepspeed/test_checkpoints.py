"""Checkpoints of DeepSpeed at the same number of ranks: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.deepspeed.engines import config, make_engine
from tests.deepspeed.experts import resume_mixture, run_mixture
from tests.deepspeed.halves import HALF, PORTABLE, TAG, Settings, content, save_half, second_half, uninterrupted
from tests.deepspeed.references import SHAPES
from tests.deepspeed.test_stages import BF16_OPTIMIZER
from tests.harness.pool import run

pytestmark = pytest.mark.deepspeed
CASES: dict[str, tuple[Settings, torch.dtype, Settings]] = {
    **{f"stage_{s}_{d}": (config(s, t), t, {}) for s in range(4) for d, t in (("fp32", torch.float32),
                                                                              ("bf16", torch.bfloat16))},
    "bf16_optimizer": (config(1, torch.bfloat16) | BF16_OPTIMIZER, torch.bfloat16, {}),
    "round_robin": (config(2, round_robin_gradients=True), torch.float32, {}),
    "sub_groups": (config(3, sub_group_size=1000), torch.float32, {}),
    "offload": (config(3, offload_optimizer={"device": "cpu"}), torch.float32, {}),
    "speed": (config(1), torch.float32, {"use_speed": True}),
    "momentum": (config(3), torch.float32, {"use_schedulefree": False}),
    "unfactored": (config(1), torch.float32, {"factored": False}),
    "no_quirks": (config(3), torch.float32, {"reference_quirks": False}),
    "prodigy_steps": (config(1), torch.float32, {"prodigy_steps": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_ranks_resume_bit_for_bit(case: str, tmp_path: Path) -> None:
    settings, dtype, switches = CASES[case]
    expected = run(2, uninterrupted, settings, dtype, switches)
    first = run(2, save_half, tmp_path, settings, dtype, switches)
    second = run(2, second_half, tmp_path, TAG, settings, dtype, switches)
    for whole, one, two in zip(expected, first, second, strict=True):
        assert whole.groups == one.groups + two.groups
        assert all(torch.equal(two.weights[name], value) for name, value in whole.weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts_resume_bit_for_bit(stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = config(stage, dtype)
    expected = run(4, run_mixture, 2 * HALF, settings, dtype)
    for whole, two in zip(expected, run(4, resume_mixture, tmp_path, 2 * HALF, settings, dtype), strict=True):
        assert whole.groups[HALF:] == two.groups
        assert all(torch.equal(two.weights[name], value) for name, value in whole.weights.items())


@pytest.mark.parametrize("mode", ["eval", "averaged"])
@pytest.mark.parametrize("stage", [1, 3])
def test_saved_in_evaluation_mode(stage: int, mode: str, tmp_path: Path) -> None:
    expected = run(2, uninterrupted, config(stage), torch.float32, {})
    run(2, save_half, tmp_path, config(stage), torch.float32, {}, mode)
    second = run(2, second_half, tmp_path, TAG, config(stage), torch.float32, {})
    assert not content(tmp_path / PORTABLE)["optimizer"]["param_groups"][0]["train_mode"]
    for whole, two in zip(expected, second, strict=True):
        exact = mode == "averaged"
        assert not exact or whole.groups[HALF:] == two.groups
        for name, value in whole.weights.items():
            assert torch.allclose(two.weights[name], value, rtol=0.0 if exact else 1e-5, atol=0.0 if exact else 1e-7)


def load_with(folder: Path, settings: Settings) -> str:
    engine = make_engine(SHAPES, settings, groups=2)
    with pytest.raises(ValueError) as error:
        engine.load_checkpoint(str(folder), tag=TAG)
    engine.destroy()
    return str(error.value)


def test_other_slices_are_refused(tmp_path: Path) -> None:
    run(2, save_half, tmp_path, config(2), torch.float32, {})
    for message in run(2, load_with, tmp_path, config(2, round_robin_gradients=True)):
        assert "another slice of parameter" in message and "round_robin_gradients" in message
