"""From ZeRO to other ranks, other stages, FSDP2 and one device, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ppsf_dist import ProdigyPlusScheduleFree, fsdp
from ppsf_dist.deepspeed import load_checkpoint, save_checkpoint
from ppsf_dist.deepspeed.universal import main as convert
from tests.deepspeed.engines import GivenGradients, config, gradients_for, make_engine, make_groups, numbers
from tests.deepspeed.halves import (
    AGAIN,
    HALF,
    NOT_UNIVERSAL,
    PORTABLE,
    TAG,
    UNIVERSAL,
    Settings,
    assert_same_content,
    check_second_half,
    save_half,
    second_half,
    thaw,
    train,
    uninterrupted,
)
from tests.deepspeed.references import SHAPES, STEPS
from tests.deepspeed.test_stages import BF16_OPTIMIZER
from tests.harness.models import D0, initial_weights
from tests.harness.pool import run
from tests.runs import Run

pytestmark = pytest.mark.deepspeed
SOURCES: dict[str, tuple[Settings, torch.dtype, Settings]] = {
    "stage_1_fp32": (config(1), torch.float32, {}),
    "stage_3_bf16": (config(3, torch.bfloat16, sub_group_size=1000), torch.bfloat16, {}),
    "bf16_optimizer": (config(1, torch.bfloat16) | BF16_OPTIMIZER, torch.bfloat16, {}),
    "alignment": (config(2, parameter_alignment=True), torch.float32, {}),
    "unfactored": (config(1), torch.float32, {"factored": False}),
    "no_quirks": (config(3), torch.float32, {"reference_quirks": False}),
    "speed": (config(1), torch.float32, {"use_speed": True}),
    "momentum": (config(3), torch.float32, {"use_schedulefree": False}),
}


@pytest.mark.parametrize("case", SOURCES)
def test_universal_checkpoints(case: str, tmp_path: Path) -> None:
    """From 2 ranks to others, at the same stage and at another."""
    settings, dtype, switches = SOURCES[case]
    whole = run(2, uninterrupted, settings, dtype, switches)[0]
    first = run(2, save_half, tmp_path, settings, dtype, switches)
    convert([str(tmp_path / TAG), str(tmp_path / UNIVERSAL), "--workers", "1"])
    other_stage = 3 if settings["zero_optimization"]["stage"] == 1 else 1
    other = config(other_stage, dtype)
    for ranks, target in ((1, settings), (4, settings), (4, other)) if "stage" in case else ((4, other),):
        universal = target | {"checkpoint": {"load_universal": True}}
        second = run(ranks, second_half, tmp_path, UNIVERSAL, universal, dtype, switches)
        assert_same_content(tmp_path / AGAIN, tmp_path / PORTABLE, NOT_UNIVERSAL)
        check_second_half(first, second, whole, dtype)


def refusal_of_universal(folder: Path) -> str:
    engine = make_engine(SHAPES, config(1) | {"checkpoint": {"load_universal": True}}, groups=2)
    engine.load_checkpoint(str(folder), tag=UNIVERSAL)
    with pytest.raises(ValueError) as error:
        train(engine, torch.float32, HALF, STEPS)
    return str(error.value)


def test_a_universal_checkpoint_of_round_robin_gradients_is_refused(tmp_path: Path) -> None:
    run(2, save_half, tmp_path, config(2, round_robin_gradients=True), torch.float32, {})
    convert([str(tmp_path / TAG), str(tmp_path / UNIVERSAL), "--workers", "1"])
    (message,) = run(1, refusal_of_universal, tmp_path)
    assert "round_robin_gradients=true" in message and "set it to false, save again" in message


def test_a_universal_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run(2, save_half, tmp_path, config(1), torch.float32, {})
    convert([str(tmp_path / TAG), str(tmp_path / UNIVERSAL), "--workers", "1"])
    file = tmp_path / UNIVERSAL / "zero" / "optimizer_state.pt"
    state = torch.load(file, weights_only=False)
    del state["param_groups"][0]["ppsf_dist"]
    torch.save(state, file)
    (message,) = run(1, refusal_of_universal, tmp_path)
    assert "made with another optimizer" in message


@pytest.mark.parametrize("source,target", [(1, 3), (3, 1), (0, 2), (2, 0)])
def test_portable_checkpoints_between_stages(source: int, target: int, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    whole = run(2, uninterrupted, config(source, dtype), dtype, {})[0]
    first = run(2, save_half, tmp_path, config(source, dtype), dtype, {})
    second = run(4, second_half, tmp_path, PORTABLE, config(target, dtype), dtype, {})
    assert_same_content(tmp_path / AGAIN, tmp_path / PORTABLE)
    check_second_half(first, second, whole, dtype)


def without_deepspeed(folder: Path, first: int, last: int) -> Run:
    """Train on FSDP2, or on one device; load before and save after."""
    model = GivenGradients(initial_weights(SHAPES))
    ranks = dist.get_world_size()
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    if not first:
        thaw(model)
    optimizer = ProdigyPlusScheduleFree(make_groups(model, 2), d0=D0)
    if first:
        assert fsdp.load_checkpoint(folder / PORTABLE, model, optimizer) == {"step": first}
    run_ = Run({}, {}, {})
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, torch.float32)):
        if first <= step < last:
            share = ranks if dist.get_rank() == ranks - 1 else 0
            model({name: gradient * share for name, gradient in gradients.items()}).backward()
            optimizer.step()
            optimizer.zero_grad()
            run_.groups.append(numbers(optimizer))
    if last < STEPS:
        fsdp.save_checkpoint(folder / PORTABLE, model, optimizer, extra={"step": last})
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run_.weights = {name: full(parameter) for name, parameter in parameters.items()}
    return run_


def full(parameter: nn.Parameter) -> Tensor:
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach().clone()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_from_deepspeed_to_fsdp_and_one_device(stage: int, ranks: int, tmp_path: Path) -> None:
    whole = run(2, uninterrupted, config(stage), torch.float32, {})[0]
    first = run(2, save_half, tmp_path, config(stage), torch.float32, {})
    check_second_half(first, run(ranks, without_deepspeed, tmp_path, HALF, STEPS), whole, torch.float32)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_from_fsdp_and_one_device_to_deepspeed(stage: int, ranks: int, tmp_path: Path) -> None:
    whole = run(2, uninterrupted, config(stage), torch.float32, {})[0]
    first = run(ranks, without_deepspeed, tmp_path, 0, HALF)
    second = run(2, second_half, tmp_path, PORTABLE, config(stage), torch.float32, {})
    assert_same_content(tmp_path / AGAIN, tmp_path / PORTABLE)
    check_second_half(first, second, whole, torch.float32)


MISFITS = {"speed": "use_speed", "shape": "tall has shape"}


def load_what_does_not_fit(folder: Path, stage: int) -> None:
    speed = make_engine(SHAPES, config(stage), groups=2, use_speed=True)
    train(speed, torch.float32, 0, 1)
    save_checkpoint(folder / "speed", speed)
    others = [(name, (33, 3) if name == "tall" else shape) for name, shape in SHAPES]
    save_checkpoint(folder / "shape", make_engine(others, config(stage), groups=2))
    engine = make_engine(SHAPES, config(stage), groups=2)
    thaw(engine.module)
    train(engine, torch.float32, 0, HALF)
    save_checkpoint(folder / PORTABLE, engine)
    for name, message in MISFITS.items():
        with pytest.raises(ValueError, match=message):
            load_checkpoint(folder / name, engine)
        save_checkpoint(folder / f"after_{name}", engine)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_that_is_refused_changes_nothing(stage: int, tmp_path: Path) -> None:
    run(2, load_what_does_not_fit, tmp_path, stage)
    for name in MISFITS:
        assert_same_content(tmp_path / f"after_{name}", tmp_path / PORTABLE)


class Bomb:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_strangers_checkpoint_runs_no_code_when_it_is_converted(tmp_path: Path) -> None:
    """DeepSpeed's converter opens every file of some names, in folders below too."""
    for place, name in enumerate(("mp_rank_00_model_states.pt", "below/zero_pp_rank_0_mp_rank_00_optim_states.pt")):
        folder, mark = tmp_path / f"source_{place}", tmp_path / "ran"
        (folder / name).parent.mkdir(parents=True)
        torch.save({"module": {}, "more": Bomb(mark)}, folder / name)
        with pytest.raises(ValueError, match=f"{name} is not read, because it is no plain data"):
            convert([str(folder), str(tmp_path / UNIVERSAL)])
        assert not mark.exists() and not (tmp_path / UNIVERSAL).exists()
