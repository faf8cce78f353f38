"""One line to save a training run, and one to go on, on whatever layout the model is now."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ppsf_dist.checkpoints import CheckpointFiles, open_checkpoint, write_checkpoint
from ppsf_dist.sharding import everyone, together
from ppsf_dist.state.portable import read_groups


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, extra: dict[str, Any] | None = None
) -> None:
    """Save weights, optimizer state and a few plain values. Every rank must call it; ``path`` must be shared.

    The checkpoint is written beside the one before, which is removed only when the new one is complete and on disk: a
    save that is killed half-way leaves the previous one loadable. Nothing else in ``path`` is removed or written over.
    From its first save on a process keeps ``path`` for itself, until it ends or calls ``release_checkpoint``.

    Args:
        path: folder of this run's checkpoint.
        model: what is trained.
        optimizer: of the model, in training or in evaluation mode; the mode is saved too.
        extra: values that JSON can hold, such as the number of steps done. They come back as JSON has them: tuples as
            lists, keys as strings. Those of the first rank are saved.

    Raises:
        TypeError: ``extra`` holds something that JSON cannot.
        FileExistsError: the folder that this save would make is there already, and no save has made it.
        OSError: some rank cannot write.
        RuntimeError: another job saves to ``path``.

    All are raised on every rank, with the rank that failed and the cause. The checkpoint before stays.
    """

    def state() -> dict[str, Any]:
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    write_checkpoint(path, state, extra)


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, *, verify: bool = True
) -> dict[str, Any]:
    """Load what ``save_checkpoint`` saved, on any number of ranks and any layout. Every rank must call it.

    Everything is read before the first weight is written, so for a moment there are two copies of the weights that this
    rank holds. A checkpoint of a stranger runs no code (``docs/security.md``).

    Args:
        path: folder of the run's checkpoint.
        model: to load into.
        optimizer: to load into; its mode is restored too.
        verify: compare each file with its checksum before it is used. The ranks share the files between them, and it
            takes less time than reading them.

    Returns:
        The ``extra`` values of the save.

    Raises:
        FileNotFoundError: ``path`` holds no finished checkpoint.
        ValueError: the checkpoint was made with other switches or shapes, or it is damaged; the message names what.
            Nothing is changed then.

    Both are raised on every rank, with the rank that failed and the cause.
    """
    files = open_checkpoint(path, verify=verify)
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    team = everyone()
    together(team, lambda: _read(files, state, optimizer))
    # The optimizer looks at what it gets before it changes anything, so the weights come after it.
    together(team, lambda: set_optimizer_state_dict(model, optimizer, state["optimizer"]))
    together(team, lambda: set_model_state_dict(model, state["model"]))
    return files.extra


def _read(files: CheckpointFiles, state: dict[str, Any], optimizer: Optimizer) -> None:
    """Read into tensors that the model does not see."""
    model = state["model"]
    files.check_model({name: value.shape for name, value in model.items() if isinstance(value, Tensor)})
    method = getattr(optimizer, "method", None)
    if method is not None and "state_version" in optimizer.param_groups[0]:
        saved = files.groups()
        read_groups(method, {"param_groups": saved}, optimizer.param_groups)
        for theirs, asked in zip(saved, state["optimizer"]["param_groups"], strict=True):
            # Arguments that have come since it was made: they stay the optimizer's.
            for name in set(method.arguments) - set(theirs):
                asked.pop(name, None)
    state["model"] = {
        name: torch.empty_like(value) if isinstance(value, Tensor) else value for name, value in model.items()
    }
    files.load(state)
