"""State between its local form, in which the step uses it, and the portable form, in which a checkpoint keeps it.

Portable state has the same keys on every rank and no tuple or None. Tensors like the parameter lie as the parameter
does; factored moments are whole; the samples ``p0`` and ``s``, whose number follows no shard boundary, become a matrix
with one row for each row of the parameter, so that they reshard with it. The reference's form is read as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm.step_size import SLICE
from ppsf_dist.options import ARGUMENTS
from ppsf_dist.scalars import GROUP_NUMBERS, PARAMETER_NUMBERS, initial_numbers
from ppsf_dist.sharding import Shard
from ppsf_dist.work import sample_indices

STATE_VERSION = 1
"""Of the form of a checkpoint: raised when an older release could not read it."""

LIKE_PARAMETER = ("z", "exp_avg", "exp_avg_sq", "y")
WHOLE = ("exp_avg_sq_row", "exp_avg_sq_col")
SAMPLED = ("p0", "s")
STRUCTURAL = ("use_schedulefree", "use_speed", "use_focus", "factored", "factored_fp32")
"""Switches that decide which state there is: a checkpoint made with other ones does not fit."""


def to_portable(shard: Shard, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state for a checkpoint."""
    portable: dict[str, Any] = {}
    for name, value in state.items():
        if name in LIKE_PARAMETER:
            portable[name] = shard.spread(value.clone())
        elif name in WHOLE:
            portable[name] = value.clone()
        elif name in SAMPLED:
            portable[name] = shard.spread_rows(_by_row(shard, value))
        else:
            portable[name] = value
    for name in SAMPLED if "p0" not in state else ():
        # Freed by prodigy_steps; the keys of a checkpoint do not depend on when it was made.
        freed = shard.weights().new_zeros(shard.row_count, row_width(shard.shape))
        portable[name] = shard.spread_rows(freed)
    return portable


def read_groups(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checkpoint's groups with everything that this optimizer keeps in a group, and nothing else.

    Raises:
        ValueError: the groups do not fit: their number, their sizes, or switches that decide which state there is.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, this optimizer {len(groups)}: build it with the groups "
            "that the checkpoint was made with"
        )
    result = []
    for index, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"parameter group {index} has {len(theirs['params'])} parameters in the checkpoint and "
                f"{len(ours['params'])} here: build the optimizer with the parameters the checkpoint was made with"
            )
        _check_version(theirs, index)
        for name in STRUCTURAL:
            if name in theirs and bool(theirs[name]) != bool(ours[name]):
                raise ValueError(
                    f"{name} is {theirs[name]!r} in parameter group {index} of the checkpoint and {ours[name]!r} here, "
                    "which needs other state: build the optimizer with the checkpoint's value"
                )
        keep = set(ARGUMENTS) | set(GROUP_NUMBERS) | {"train_mode", "params", "param_names", "reference_quirks"}
        known = set(initial_numbers(ours)) | set(ours)
        merged = {name: value for name, value in ours.items()}
        merged |= {name: value for name, value in theirs.items() if name in keep or name in known}
        for name in GROUP_NUMBERS:
            if isinstance(merged.get(name), Tensor):
                merged[name] = merged[name].item()
        merged["betas"] = tuple(merged["betas"])
        result.append(merged)
    return result


def _check_version(group: dict[str, Any], index: int) -> None:
    version = group.get("state_version", STATE_VERSION)
    if version != STATE_VERSION:
        raise ValueError(
            f"state_version is {version} in parameter group {index} of the checkpoint, this release reads "
            f"{STATE_VERSION}: load it with the release that made it"
        )
    if "d" not in group or "k" not in group:
        raise ValueError(
            f"parameter group {index} of the checkpoint has no 'd' or 'k': it was not made by this optimizer or by "
            "prodigy-plus-schedule-free 2.x"
        )
    if "prev_d_numerator" not in group:
        raise ValueError(
            f"parameter group {index} of the checkpoint has no 'prev_d_numerator': it was made by "
            "prodigy-plus-schedule-free 1.x, whose statistics mean something else; start a new run from the weights"
        )


def read_state(
    state_dict: dict[str, Any], shards: Sequence[Shard], groups: Sequence[dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """The state of each parameter in its local form, from portable state or from the reference's.

    Raises:
        ValueError: a tensor has another shape than the parameter needs, or a key is missing.
    """
    by_param = {shard.param: shard for shard in shards}
    result: dict[Tensor, dict[str, Any]] = {}
    read_groups(state_dict, groups)
    for index, (theirs, ours) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for key, param in zip(theirs["params"], ours["params"], strict=True):
            saved = state_dict["state"].get(key)
            if saved:
                where = f"parameter {key} (group {index}, shape {by_param[param].shape})"
                result[param] = _to_local(by_param[param], saved, theirs, ours, where)
    return result


def _to_local(
    shard: Shard, saved: dict[str, Any], theirs: dict[str, Any], ours: dict[str, Any], where: str
) -> dict[str, Any]:
    weights = shard.weights()
    local: dict[str, Any] = {}
    needed = "z" if ours["use_schedulefree"] else "exp_avg"
    if needed not in saved:
        raise ValueError(f"the checkpoint has no {needed!r} for {where}")
    for name, value in saved.items():
        if name in LIKE_PARAMETER:
            _check_shape(name, value, shard.shape, where)
            local[name] = _on(shard.extract(value), weights).clone(memory_format=torch.preserve_format)
        elif name in WHOLE:
            local[name] = _on(_whole(value), weights).float().clone()
        elif name in SAMPLED:
            local[name] = _on(_samples_from(shard, name, value, where), weights)
        elif name in PARAMETER_NUMBERS:
            local[name] = float(value)
    # The reference counts steps by group only: a parameter with state has had at least one.
    local.setdefault("step", float(max(int(theirs["k"]) - 1, 1)))
    return local


def _on(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device)


def _whole(value: Tensor) -> Tensor:
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()


def _check_shape(name: str, value: Tensor, shape: Sequence[int], where: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} of {where} has shape {tuple(value.shape)} in the checkpoint: it is another model's")


def row_width(shape: Sequence[int]) -> int:
    """Columns of the by-row form of the samples: no row of a parameter holds more."""
    return -(-math.prod(shape[1:]) // SLICE)


def _places(shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Global index, row within the shard, and column in the by-row form, of each sample of a shard."""
    index = torch.cat(
        [
            box.flat_start + sample_indices(box) if box.is_flat else box.flat_index()[sample_indices(box)]
            for box in shard.boxes
        ]
        or [torch.empty(0, dtype=torch.int64)]
    )
    row = max(1, math.prod(shard.shape[1:]))
    return index, index // row - shard.first_row, index % row // SLICE


def _by_row(shard: Shard, samples: Tensor) -> Tensor:
    _, row, column = _places(shard)
    matrix = samples.new_zeros(shard.row_count, row_width(shard.shape))
    matrix[row.to(samples.device), column.to(samples.device)] = samples
    return matrix


def _samples_from(shard: Shard, name: str, value: Tensor, where: str) -> Tensor:
    index, row, column = _places(shard)
    total = -(-math.prod(shard.shape) // SLICE)
    if value.dim() == 0:
        # The reference stores one zero for a parameter that starts at zero.
        return value.expand(len(index)).clone()
    if value.dim() == 1:
        if len(value) != total:
            raise ValueError(f"{name} of {where} has {len(value)} samples in the checkpoint, {total} are needed")
        whole = _whole(value)
        return whole[(index // SLICE).to(whole.device)]
    rows = shard.shape[0] if shard.shape else 1
    _check_shape(name, value, (rows, row_width(shard.shape)), where)
    local = shard.extract_rows(value)
    return local[row.to(local.device), column.to(local.device)]
