"""State between its local form, in which the step uses it, and the portable form, in which a checkpoint keeps it.

Portable state has the same keys on every rank and no tuple or None. Tensors like the parameter lie as the parameter
does; factored moments are whole; the samples ``p0`` and ``s``, whose number follows no shard boundary, become a matrix
with one row for each row of the parameter, so that they reshard with it. The reference's form is read as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm.second_moment import factoring
from ppsf_dist.algorithm.step_size import SLICE
from ppsf_dist.options import naming, plain, settle, validate_group, validate_numbers, validate_together
from ppsf_dist.refusals import DTYPES
from ppsf_dist.scalars import GROUP_NUMBERS, PARAMETER_NUMBERS, initial_numbers
from ppsf_dist.sharding import Shard
from ppsf_dist.work import sample_indices

_SIGNED = "exp_avg_x0_dot"

STATE_VERSION = 1
"""Of the form of a checkpoint: raised when an older release could not read it."""

LIKE_PARAMETER = ("z", "exp_avg", "exp_avg_sq", "y")
WHOLE = ("exp_avg_sq_row", "exp_avg_sq_col")
SAMPLED = ("p0", "s")
MOMENTS = ("exp_avg_sq", *WHOLE)
STRUCTURAL = ("use_schedulefree", "use_speed", "use_focus", "factored", "factored_fp32")
"""Switches that decide which state there is: a checkpoint made with other ones does not fit."""

OF_THE_LOOP = ("params", "fused_back_pass")
"""What of a group belongs to the program and not to its run: the optimizer keeps its own."""

OF_THE_REFERENCE = ("optimiser_version", "running_d_numerator", "running_d_denom", "exp_avg_sq_metadata")
"""What prodigy-plus-schedule-free keeps for itself and nothing here needs."""


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
    for name in SAMPLED if "p0" not in state and ("z" in state or "exp_avg" in state) else ():
        # Freed by prodigy_steps; the keys of a checkpoint do not depend on when it was made.
        freed = shard.weights().new_zeros(shard.row_count, row_width(shard.shape))
        portable[name] = shard.spread_rows(freed)
    return portable


def pack(
    groups: Sequence[dict[str, Any]], state: Mapping[Any, dict[str, Any]], shards: Sequence[Shard]
) -> dict[str, Any]:
    """A state dict as torch's optimizers make it: parameters by position, entries that belong to none as they are.

    Args:
        groups: the optimizer's groups.
        state: its state.
        shards: of the parameters that have state, each once.
    """
    index_of: dict[Tensor, int] = {}
    for position, param in enumerate(param for group in groups for param in group["params"]):
        index_of.setdefault(param, position)
    entries = {index_of[shard.param]: to_portable(shard, state[shard.param]) for shard in shards}
    others = {key: value for key, value in state.items() if not isinstance(key, Tensor)}
    return {
        "state": entries | others,
        "param_groups": [{**group, "params": [index_of[param] for param in group["params"]]} for group in groups],
    }


def read_groups(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as they are to be after loading: the checkpoint's, with the optimizer's own parameters.

    Arguments that the checkpoint does not have stay the optimizer's; keys that nothing here knows are kept.

    Raises:
        ValueError: the groups do not fit: their number, their sizes, switches that decide which state there is, or an
            argument or number that is out of range.
    """
    if "param_groups" not in state_dict:
        raise ValueError(
            f"the checkpoint has no 'param_groups', but {sorted(map(str, state_dict))[:5]}: it is no optimizer's"
        )
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, this optimizer {len(groups)}: build it with the groups "
            "that the checkpoint was made with"
        )
    result = [_read_group(theirs, ours, i) for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True))]
    with naming("the checkpoint"):
        validate_together(result)
    return result


def _read_group(theirs: dict[str, Any], ours: dict[str, Any], index: int) -> dict[str, Any]:
    if len(theirs["params"]) != len(ours["params"]):
        raise ValueError(
            f"parameter group {index} has {len(theirs['params'])} parameters in the checkpoint and "
            f"{len(ours['params'])} here: build the optimizer with the parameters the checkpoint was made with"
        )
    _check_version(theirs, index)
    kept = {key: value for key, value in theirs.items() if key not in OF_THE_LOOP + OF_THE_REFERENCE}
    merged = {**ours, **initial_numbers(ours), **deepcopy(kept)}
    with of_the_checkpoint(f"parameter group {index} of the checkpoint", f"state_dict['param_groups'][{index}]"):
        validate_group(merged)
        validate_numbers(merged)
    settle(merged)
    for name in STRUCTURAL:
        if merged[name] != ours[name]:
            raise ValueError(
                f"{name} is {theirs[name]!r} in parameter group {index} of the checkpoint and {ours[name]!r} here, "
                "which needs other state: build the optimizer with the checkpoint's value"
            )
    return merged


@contextmanager
def of_the_checkpoint(where: str, place: str) -> Iterator[None]:
    """Let errors say where in a checkpoint they are, and what to do."""
    with naming(f"{where}; it is damaged or was changed: load another one, or correct {place} before loading"):
        yield


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
    missing = [name for name in GROUP_NUMBERS if name not in group] if "state_version" in group else []
    if missing:
        raise ValueError(
            f"parameter group {index} of the checkpoint has no {missing[0]!r}: it is damaged or was changed; load "
            "another one"
        )


def read_state(
    state_dict: dict[str, Any], shards: Sequence[Shard], groups: Sequence[dict[str, Any]]
) -> dict[Any, dict[str, Any]]:
    """The state of each parameter in its local form, from portable state or from the reference's.

    Args:
        state_dict: the checkpoint.
        shards: of all parameters.
        groups: what :func:`read_groups` has made of the checkpoint's groups.

    Raises:
        ValueError: an entry is missing, of another shape or dtype than the parameter needs, or out of range.
    """
    if "state" not in state_dict:
        raise ValueError(f"the checkpoint has no 'state', but {sorted(map(str, state_dict))[:5]}: it is no optimizer's")
    by_param = {shard.param: shard for shard in shards}
    result: dict[Any, dict[str, Any]] = {}
    kinds = set()
    for index, (theirs, ours) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for key, param in zip(theirs["params"], ours["params"], strict=True):
            kinds.add(type(key))
            saved = state_dict["state"].get(key)
            if saved:
                where = f"parameter {key} (group {index}, shape {by_param[param].shape})"
                with of_the_checkpoint(f"{where} of the checkpoint", f"state_dict['state'][{key!r}]"):
                    result[param] = _to_local(by_param[param], saved, ours)
    # Keys of another kind than the parameters' belong to no parameter.
    others = [key for key in state_dict["state"] if type(key) not in kinds]
    return result | {key: deepcopy(state_dict["state"][key]) for key in others}


def _to_local(shard: Shard, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    weights = shard.weights()
    local: dict[str, Any] = {}
    for name, value in saved.items():
        if name in (*LIKE_PARAMETER, *WHOLE, *SAMPLED):
            _check_dtype(name, value)
        if name in LIKE_PARAMETER:
            _check_shape(name, value, shard.shape)
            local[name] = _on(shard.extract(value), weights).clone(memory_format=torch.preserve_format)
        elif name in WHOLE:
            local[name] = _on(_whole(value), weights).float().clone()
        elif name in SAMPLED:
            local[name] = _on(_samples_from(shard, name, value), weights)
        elif name not in OF_THE_REFERENCE:
            local[name] = _on(value, weights).clone() if isinstance(value, Tensor) else deepcopy(value)
    if not set(local) & {*LIKE_PARAMETER, *WHOLE, *SAMPLED, *PARAMETER_NUMBERS}:
        # Somebody else's entries, saved before the first step.
        return local
    # The reference counts steps by group only: a parameter with state has had at least one.
    local.setdefault("step", float(max(int(group["k"]) - 1, 1)))
    check_state(shard, local, group)
    return local


def needed_state(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensors that a parameter of a shape needs to go on in a group."""
    first = "z" if group["use_schedulefree"] else "exp_avg"
    factors = group["factored"] and not group["use_focus"] and factoring(shape) is not None
    frozen = 0 < group["prodigy_steps"] <= group["k"]
    samples = () if frozen else SAMPLED[:1] if group["use_speed"] else SAMPLED
    return first, *(WHOLE if factors else ("exp_avg_sq",)), *samples


def check_state(shard: Shard, local: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Check the state of a parameter in its local form, and make its numbers Python's own.

    Points and their averages may hold what the weights held; moments and sums never take in what is not finite.

    Raises:
        ValueError: a tensor is missing, of another shape, or not finite, or a number is out of range.
    """
    for name in needed_state(shard.shape, group):
        if name not in local:
            raise ValueError(f"there is no {name!r}")
    for name in LIKE_PARAMETER:
        if name in local:
            _check_shape(name, local[name], shard.weights().shape)
    axes = factoring(shard.shape)
    for name, shape in zip(WHOLE, (axes.row_shape, axes.col_shape) if axes else (), strict=False):
        if name in local:
            _check_shape(name, local[name], shape)
    # Under FOCUS the second moment is an average of weights.
    squares = () if group["use_focus"] else MOMENTS
    for name in ("exp_avg", *squares, "s"):
        value = local.get(name)
        if value is None or not value.numel() or value.is_meta:
            continue
        least, most = value.aminmax()
        if not (least.isfinite() and most.isfinite()):
            raise ValueError(f"{name} is not finite everywhere")
        if name in squares and least < 0:
            raise ValueError(f"{name} is a mean of squares, but {float(least)} somewhere")
    for name in PARAMETER_NUMBERS:
        number = plain(local.get(name, 0.0))
        if not isinstance(number, (int, float)) or not math.isfinite(number) or (number < 0 and name != _SIGNED):
            raise ValueError(f"{name}={number!r} is out of range: allowed is a finite number >= 0")
        if name in local:
            local[name] = float(number)


def _on(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device)


def _whole(value: Tensor) -> Tensor:
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()


def _check_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(shape)}: it is another model's")


def _check_dtype(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: allowed is a tensor")
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} is {value.dtype}: allowed is {', '.join(map(str, DTYPES))}")


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


def _samples_from(shard: Shard, name: str, value: Tensor) -> Tensor:
    index, row, column = _places(shard)
    total = -(-math.prod(shard.shape) // SLICE)
    if value.dim() == 0 and shard.shape and name == "p0" and not value.item():
        # The reference stores one zero for a parameter that starts at zero.
        return value.expand(len(index)).clone()
    if value.dim() == 1:
        if len(value) != total:
            raise ValueError(f"{name} has {len(value)} samples, but {total} are needed: it is another model's")
        whole = _whole(value)
        return whole[(index // SLICE).to(whole.device)]
    rows = shard.shape[0] if shard.shape else 1
    _check_shape(name, value, (rows, row_width(shard.shape)))
    local = shard.extract_rows(value)
    return local[row.to(local.device), column.to(local.device)]
