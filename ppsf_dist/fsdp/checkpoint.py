"""One line to save a training run, and one to go on, on whatever layout the model is now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from ppsf_dist.checkpoint import read_groups
from ppsf_dist.fsdp.files import CheckpointFiles

LATEST = "latest"
EXTRA = "extra.json"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _current(path: Path) -> Path | None:
    """The folder that the last finished save left, or None."""
    pointer = path / LATEST
    return path / pointer.read_text().strip() if pointer.exists() else None


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, extra: dict[str, Any] | None = None
) -> None:
    """Save weights, optimizer state and a few plain values. Every rank must call it; ``path`` must be shared.

    The checkpoint is written beside the one before, which is removed only when the new one is complete: a save that is
    killed half-way leaves the previous one loadable.

    Args:
        path: folder of this run's checkpoint.
        model, optimizer: in training or in evaluation mode; the mode is saved too.
        extra: values that JSON can hold, such as the number of steps done.

    Raises:
        TypeError: ``extra`` holds something that JSON cannot.
    """
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    write_checkpoint(path, state, extra)


def write_checkpoint(path: str | os.PathLike[str], state: dict[str, Any], extra: dict[str, Any] | None = None) -> None:
    """Save the state dicts of model and optimizer in the way of :func:`save_checkpoint`."""
    root = Path(path)
    text = json.dumps(extra or {})
    before = _current(root)
    number = 0 if before is None else int(before.name) + 1
    folder = root / str(number)
    _barrier()
    if _rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        # What a killed save may have left.
        shutil.rmtree(folder, ignore_errors=True)
    _barrier()
    save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    if _rank() == 0:
        (folder / EXTRA).write_text(text)
        pointer = root / f"{LATEST}.new"
        pointer.write_text(folder.name)
        os.replace(pointer, root / LATEST)
        for other in root.iterdir():
            if other.is_dir() and other.name.isdigit() and other != folder:
                shutil.rmtree(other)
    _barrier()


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` saved, on any number of ranks and any layout. Every rank must call it.

    Returns:
        The ``extra`` values of the save.

    Raises:
        FileNotFoundError: ``path`` holds no finished checkpoint.
        ValueError: the checkpoint was made with other switches or shapes; the message names them. Nothing is changed
            then.
    """
    folder = finished_checkpoint(path)
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    files = CheckpointFiles(folder)
    files.check_model({name: value.shape for name, value in state["model"].items() if isinstance(value, Tensor)})
    if "state_version" in optimizer.param_groups[0]:
        read_groups({"param_groups": files.groups()}, optimizer.param_groups)
    load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return read_extra(folder)


def finished_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The folder of the last finished save.

    Raises:
        FileNotFoundError: ``path`` holds no finished checkpoint.
    """
    folder = _current(Path(path))
    if folder is None:
        raise FileNotFoundError(f"{path} holds no finished checkpoint: expected a file {LATEST!r} in it")
    return folder


def read_extra(folder: Path) -> dict[str, Any]:
    """The plain values that lie beside the state."""
    extra: dict[str, Any] = json.loads((folder / EXTRA).read_text())
    return extra
