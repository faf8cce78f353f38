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
from ppsf_dist.methods.base import Method
from ppsf_dist.methods.rules import naming, plain
from ppsf_dist.methods.switches import Switches
from ppsf_dist.refusals import DTYPES
from ppsf_dist.sharding import Shard
from ppsf_dist.state.inventory import (
    LIKE_PARAMETER,
    PARAMETER_NUMBERS,
    REPLICATED,
    SAMPLED,
    SIGNED,
    TENSORS,
    Holds,
    Lies,
    needed,
)
from ppsf_dist.state.samples import sample_indices

STATE_VERSION = 1
"""Of the form of a checkpoint: raised when an older release could not read it."""

OF_THE_LOOP = ("params", "fused_back_pass")
"""What of a group belongs to the program and not to its run: the optimizer keeps its own."""


def to_portable(shard: Shard, state: dict[str, Any], switches: Switches) -> dict[str, Any]:
    """A parameter's state for a checkpoint, of a group with these switches."""
    portable: dict[str, Any] = {}
    for name, value in state.items():
        if name in LIKE_PARAMETER:
            portable[name] = shard.spread(value.clone())
        elif name in REPLICATED:
            portable[name] = value.clone()
        elif name in SAMPLED:
            portable[name] = shard.spread_rows(_by_row(shard, value, switches.slice_p))
        else:
            portable[name] = value
    for name in SAMPLED if switches.statistics and "p0" not in state and set(state) & {*LIKE_PARAMETER} else ():
        # Freed by prodigy_steps; the keys of a checkpoint do not depend on when it was made.
        freed = shard.weights().new_zeros(shard.row_count, row_width(shard.shape, switches.slice_p))
        portable[name] = shard.spread_rows(freed)
    return portable


def pack(
    method: Method, groups: Sequence[dict[str, Any]], state: Mapping[Any, dict[str, Any]], shards: Sequence[Shard]
) -> dict[str, Any]:
    """A state dict as torch's optimizers make it: parameters by position, entries that belong to none as they are.

    Args:
        method: what the optimizer is.
        groups: its groups.
        state: its state.
        shards: of the parameters that have state, each once.
    """
    index_of: dict[Tensor, int] = {}
    switches_of: dict[Tensor, Switches] = {}
    for group in groups:
        for param in group["params"]:
            index_of.setdefault(param, len(index_of))
            switches_of.setdefault(param, method.switches(group))
    entries = {
        index_of[shard.param]: to_portable(shard, state[shard.param], switches_of[shard.param]) for shard in shards
    }
    others = {key: value for key, value in state.items() if not isinstance(key, Tensor)}
    return {
        "state": entries | others,
        "param_groups": [{**group, "params": [index_of[param] for param in group["params"]]} for group in groups],
    }


def read_groups(method: Method, state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as they are to be after loading: the checkpoint's, with the optimizer's own parameters.

    Arguments that are younger than the checkpoint stay the optimizer's; keys that nothing here knows are kept.

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
    pairs = enumerate(zip(saved, groups, strict=True))
    result = [_read_group(method, theirs, ours, index) for index, (theirs, ours) in pairs]
    with naming("the checkpoint"):
        method.validate_together(result)
    return result


def _read_group(method: Method, theirs: dict[str, Any], ours: dict[str, Any], index: int) -> dict[str, Any]:
    if len(theirs["params"]) != len(ours["params"]):
        raise ValueError(
            f"parameter group {index} has {len(theirs['params'])} parameters in the checkpoint and "
            f"{len(ours['params'])} here: build the optimizer with the parameters the checkpoint was made with"
        )
    _check_version(method, theirs, index)
    kept = {key: value for key, value in theirs.items() if key not in (*OF_THE_LOOP, *method.foreign)}
    merged = {**ours, **method.initial_numbers(ours), **deepcopy(kept)}
    with of_the_checkpoint(f"parameter group {index} of the checkpoint", f"state_dict['param_groups'][{index}]"):
        method.validate_group(merged)
        method.validate_numbers(merged)
    method.settle(merged)
    for name in method.structural:
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


def _check_version(method: Method, group: dict[str, Any], index: int) -> None:
    version = group.get("state_version", STATE_VERSION)
    if version != STATE_VERSION:
        raise ValueError(
            f"state_version is {version} in parameter group {index} of the checkpoint, this release reads "
            f"{STATE_VERSION}: load it with the release that made it"
        )
    method.refuse_foreign(group, f"parameter group {index} of the checkpoint")
    missing = [name for name in method.numbers if name not in group] if "state_version" in group else []
    if missing:
        raise ValueError(
            f"parameter group {index} of the checkpoint has no {missing[0]!r}: it is damaged or was changed; load "
            "another one"
        )


def read_state(
    method: Method, state_dict: dict[str, Any], shards: Sequence[Shard], groups: Sequence[dict[str, Any]]
) -> dict[Any, dict[str, Any]]:
    """The state of each parameter in its local form, from portable state or from the reference's.

    Args:
        method: what the optimizer is.
        state_dict: the checkpoint.
        shards: of all parameters.
        groups: what ``read_groups`` has made of the checkpoint's groups.

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
                    result[param] = _to_local(method, by_param[param], saved, ours)
    # Keys of another kind than the parameters' belong to no parameter.
    others = [key for key in state_dict["state"] if type(key) not in kinds]
    return result | {key: deepcopy(state_dict["state"][key]) for key in others}


def _to_local(method: Method, shard: Shard, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    weights, slice_p = shard.weights(), method.switches(group).slice_p
    local: dict[str, Any] = {}
    for name, value in saved.items():
        if name in (*LIKE_PARAMETER, *REPLICATED, *SAMPLED):
            _check_dtype(name, value)
        if name in LIKE_PARAMETER:
            _check_shape(name, value, shard.shape)
            local[name] = _on(shard.extract(value), weights).clone(memory_format=torch.preserve_format)
        elif name in REPLICATED:
            local[name] = _on(_whole(value), weights).float().clone()
        elif name in SAMPLED:
            local[name] = _on(_samples_from(shard, name, value, slice_p), weights)
        elif name not in method.foreign:
            local[name] = _on(value, weights).clone() if isinstance(value, Tensor) else deepcopy(value)
    if not set(local) & {*LIKE_PARAMETER, *REPLICATED, *SAMPLED, *PARAMETER_NUMBERS}:
        # Somebody else's entries, saved before the first step.
        return local
    # The reference counts steps by group only: a parameter with state has had at least one.
    local.setdefault("step", float(max(group["k"] - method.numbers["k"], 1)))
    check_state(method, shard, local, group)
    return local


def check_state(method: Method, shard: Shard, local: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Check the state of a parameter in its local form, and make its numbers Python's own.

    Points and their averages may hold what the weights held; moments and sums never take in what is not finite.

    Raises:
        ValueError: a tensor is missing, of another shape, or not finite, or a number is out of range.
    """
    switches = method.switches_now(group)
    for entry in needed(switches, shard.shape):
        if entry.name not in local:
            raise ValueError(f"there is no {entry.name!r}")
    axes = factoring(shard.shape)
    shapes = dict(zip(REPLICATED, (axes.row_shape, axes.col_shape), strict=True)) if axes else {}
    for entry in TENSORS:
        value = local.get(entry.name)
        if value is None:
            continue
        if entry.lies is Lies.LIKE_PARAMETER or entry.name in shapes:
            _check_shape(entry.name, value, shapes.get(entry.name, shard.weights().shape))
        # Under FOCUS the second moment is an average of weights.
        holds = Holds.POINT if switches.focus and entry.holds is Holds.SQUARES else entry.holds
        if holds is not Holds.POINT and value.numel() and not value.is_meta:
            least, most = value.aminmax()
            if not (least.isfinite() and most.isfinite()):
                raise ValueError(f"{entry.name} is not finite everywhere")
            if holds is Holds.SQUARES and least < 0:
                raise ValueError(f"{entry.name} is a mean of squares, but {float(least)} somewhere")
    for name in PARAMETER_NUMBERS:
        number = plain(local.get(name, 0.0))
        if not isinstance(number, (int, float)) or not math.isfinite(number) or (number < 0 and name != SIGNED):
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


def row_width(shape: Sequence[int], slice_p: int) -> int:
    """Columns of the by-row form of the samples: no row of a parameter holds more."""
    return -(-math.prod(shape[1:]) // slice_p)


def _places(shard: Shard, slice_p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global index, row within the shard, and column in the by-row form, of each sample of a shard."""
    index = torch.cat(
        [
            box.flat_start + sample_indices(box, slice_p)
            if box.is_flat
            else box.flat_index()[sample_indices(box, slice_p)]
            for box in shard.boxes
        ]
        or [torch.empty(0, dtype=torch.int64)]
    )
    row = max(1, math.prod(shard.shape[1:]))
    return index, index // row - shard.first_row, index % row // slice_p


def _by_row(shard: Shard, samples: Tensor, slice_p: int) -> Tensor:
    _, row, column = _places(shard, slice_p)
    matrix = samples.new_zeros(shard.row_count, row_width(shard.shape, slice_p))
    matrix[row.to(samples.device), column.to(samples.device)] = samples
    return matrix


def _samples_from(shard: Shard, name: str, value: Tensor, slice_p: int) -> Tensor:
    index, row, column = _places(shard, slice_p)
    total = -(-math.prod(shard.shape) // slice_p)
    if value.dim() == 0 and shard.shape and name == "p0" and not value.item():
        # The reference stores one zero for a parameter that starts at zero.
        return value.expand(len(index)).clone()
    if value.dim() == 1:
        if len(value) != total:
            raise ValueError(f"{name} has {len(value)} samples, but {total} are needed: it is another model's")
        whole = _whole(value)
        return whole[(index // slice_p).to(whole.device)]
    rows = shard.shape[0] if shard.shape else 1
    _check_shape(name, value, (rows, row_width(shard.shape, slice_p)))
    local = shard.extract_rows(value)
    return local[row.to(local.device), column.to(local.device)]
