"""Runs in two halves with a checkpoint between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ppsf_dist import averaged
from ppsf_dist.checkpoints.folder import finished
from ppsf_dist.deepspeed import load_checkpoint, save_checkpoint
from tests.deepspeed.engines import FROZEN, feed, full_weights, gradients_for, make_engine, model_weights, numbers
from tests.deepspeed.references import SHAPES, STEPS
from tests.harness.models import initial_weights
from tests.runs import Run, difference

HALF = STEPS // 2
TAG, UNIVERSAL, PORTABLE, AGAIN = "half", "universal", "portable", "again"
Settings = dict[str, Any]


def train(engine: Any, dtype: torch.dtype, first: int, last: int) -> Run:
    run_ = Run({}, {}, {})
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, dtype)):
        if first <= step < last:
            feed(engine, gradients)
            run_.groups.append(numbers(engine.basic_optimizer))
    return run_


def weights_of(engine: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    return model_weights(engine) if dtype == torch.float32 else full_weights(engine)


def uninterrupted(settings: Settings, dtype: torch.dtype, switches: Settings) -> Run:
    engine = make_engine(SHAPES, settings, dtype=dtype, groups=2, **switches)
    run_ = train(engine, dtype, 0, STEPS)
    run_.weights = weights_of(engine, dtype)
    engine.destroy()
    return run_


def thaw(module: nn.Module) -> None:
    """Change the frozen parameter, so that loading it makes a difference."""
    frozen = dict(module.named_parameters())[FROZEN]
    with deepspeed.zero.GatheredParameters([frozen] if hasattr(frozen, "ds_id") else [], modifier_rank=0):
        frozen.data.fill_(2.0)


def save_half(folder: Path, settings: Settings, dtype: torch.dtype, switches: Settings, mode: str = "train") -> Run:
    """Train for half of the steps and save, in training or in evaluation mode."""
    engine = make_engine(SHAPES, settings, dtype=dtype, groups=2, **switches)
    thaw(engine.module)
    run_ = train(engine, dtype, 0, HALF)
    with averaged(engine.optimizer, engine) if mode == "averaged" else nullcontext():
        if mode == "eval":
            engine.basic_optimizer.eval()
        engine.save_checkpoint(str(folder), tag=TAG)
        save_checkpoint(folder / PORTABLE, engine, extra={"step": HALF})
    run_.weights = weights_of(engine, dtype)
    engine.destroy()
    return run_


def second_half(folder: Path, tag: str, settings: Settings, dtype: torch.dtype, switches: Settings) -> Run:
    engine = make_engine(SHAPES, settings, dtype=dtype, groups=2, **switches)
    if tag == PORTABLE:
        assert load_checkpoint(folder / PORTABLE, engine) == {"step": HALF}
    else:
        engine.load_checkpoint(str(folder), tag=tag)
    save_checkpoint(folder / AGAIN, engine)
    engine.basic_optimizer.train()
    run_ = train(engine, dtype, HALF, STEPS)
    run_.weights = weights_of(engine, dtype)
    engine.destroy()
    return run_


def content(path: Path) -> dict[str, Any]:
    """A portable checkpoint as plain tensors and numbers."""
    file = path / "content.pt"
    dcp_to_torch_save(path / finished(path).name, file)
    loaded: dict[str, Any] = torch.load(file, weights_only=False)
    return loaded


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


NOT_UNIVERSAL = (("model", FROZEN), ("model", "calls"))
"""What DeepSpeed leaves out of universal checkpoints."""


def assert_same_content(one: Path, other: Path, but_for: tuple[tuple[str, str], ...] = ()) -> None:
    """Every tensor and number of two portable checkpoints is the same, bit for bit."""
    ours, theirs = ({path: v for path, v in leaves(content(p)) if path not in but_for} for p in (one, other))
    assert but_for or float(ours["model", FROZEN][0]) == 2.0 and int(ours["model", "calls"]) == HALF
    assert ours.keys() == theirs.keys()
    assert sum(isinstance(value, Tensor) for value in ours.values()) > 4 * len(SHAPES)
    for path, value in ours.items():
        same = torch.equal(value, theirs[path]) if isinstance(value, Tensor) else value == theirs[path]
        assert same, path


def check_second_half(first: list[Run], second: list[Run], whole: Run, dtype: torch.dtype) -> None:
    for other in second[1:]:
        assert other.groups == second[0].groups
    start = {name: value.float() for name, value in initial_weights(SHAPES, dtype=dtype).items()}
    ours = Run(start, second[0].weights, {}, first[0].groups + second[0].groups)
    apart = difference(ours, Run(start, whole.weights, {}, whole.groups))
    assert apart["d"] <= 1e-6 and apart["weights"] <= 1e-5, apart
