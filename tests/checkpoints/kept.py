"""Checkpoints that a release leaves behind for the tests of later ones: ``python -m tests.checkpoints.kept FOLDER``.

Each lies beside ``expected.pt``, what weights and ``state_dict()`` were when it was saved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import save_checkpoint
from tests.harness.layouts import LAYOUTS, set_grads, shard_parameters
from tests.harness.models import NamedShapes, gradient_sequence, initial_weights
from tests.harness.pool import close, run
from tests.runs import make_optimizer

SHAPES: NamedShapes = [("factored", (33, 34)), ("zero_small", (5, 3)), ("vector", (13,)), ("cube", (3, 40, 2))]
STEPS = 5

KEPT: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "default": ("fsdp_2", torch.float32, {}),
    "speed": ("single", torch.bfloat16, {"use_speed": True}),
    "momentum": ("single", torch.float32, {"use_schedulefree": False, "reference_quirks": False, "prodigy_steps": 3}),
}
"""By name: the layout that saves, the dtype of the weights, and the switches."""


def start(name: str, layout: str) -> tuple[nn.Module, ProdigyPlusScheduleFree]:
    """A model and its optimizer before the first step."""
    _, dtype, switches = KEPT[name]
    parameters = shard_parameters(initial_weights(SHAPES, dtype=dtype), LAYOUTS[layout])
    model = nn.Module()
    model.weights = nn.ParameterDict(parameters)
    return model, make_optimizer(parameters, 2, **switches)


def step(name: str, model: nn.Module, optimizer: ProdigyPlusScheduleFree, first: int, last: int) -> None:
    for number, gradients in enumerate(gradient_sequence(SHAPES, last, dtype=KEPT[name][1])):
        if number >= first:
            assert isinstance(model.weights, nn.ParameterDict)
            set_grads(dict(model.weights.items()), gradients)
            optimizer.step()


def content(model: nn.Module, optimizer: ProdigyPlusScheduleFree) -> dict[str, Any]:
    """Everything that a checkpoint holds, whole and plain."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        if isinstance(value, Tensor):
            return getattr(value, "full_tensor", lambda: value)().detach().clone()
        return value

    return {"weights": plain(model.state_dict()), "optimizer": plain(optimizer.state_dict())}


def save(name: str, folder: Path) -> None:
    model, optimizer = start(name, KEPT[name][0])
    step(name, model, optimizer, 0, STEPS)
    save_checkpoint(folder / name, model, optimizer, {"step": STEPS})
    expected = content(model, optimizer)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(expected, folder / name / "expected.pt")


if __name__ == "__main__":
    # Workers import functions by name, and this module has none of its own while it runs.
    from tests.checkpoints.kept import save as save_on_ranks

    for kept, (its_layout, *_) in KEPT.items():
        run(LAYOUTS[its_layout].world_size, save_on_ranks, kept, Path(sys.argv[1]))
    close()
