"""State in the form of DeepSpeed's checkpoints, and back.

DeepSpeed writes what ``state_dict()`` returns into one file for each rank, and gives it back at the same number of
ranks. Its universal checkpoints reshard, but of the state they keep only ``exp_avg`` and ``exp_avg_sq``, tensors that
lie like the flat one, and the param_groups of rank 0. So ``exp_avg`` holds z (or the momentum), and ``exp_avg_sq`` the
elementwise second moment, or, of a parameter that is factored and has none, its bf16 samples p0 and s, two in a word.
The rest lies whole in the first param_group of rank 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.deepspeed.gather import gather_samples
from ppsf_dist.deepspeed.shards import Partition, ZeroShard
from ppsf_dist.methods.base import Method
from ppsf_dist.sharding import team_of_ranks
from ppsf_dist.state.inventory import REPLICATED, SAMPLED
from ppsf_dist.state.portable import check_state, of_the_checkpoint, read_groups

KEY = "ppsf_dist"
"""Of what is kept aside, in the state of a flat tensor and in the first param_group."""

Entry = dict[str, Any]
State = dict[Tensor, Entry]

ROUND_ROBIN = (
    "it was saved with zero_optimization.round_robin_gradients=true, where DeepSpeed puts the weights in the wrong "
    "places of a universal checkpoint: set it to false, save again, and convert that"
)

ROUND_ROBIN_HERE = (
    "zero_optimization.round_robin_gradients=true makes DeepSpeed put its tensors in the wrong places: set it to false"
)
EXPERTS = "it has experts, of which each rank saved others under the same names: load the checkpoint it was made from"


def to_deepspeed(method: Method, partition: Partition, state: State) -> dict[str, Any]:
    """The optimizer's state for this rank's checkpoint file, on the CPU. Collective."""
    entries: dict[int, Entry] = {}
    index_of: dict[int, int] = {}
    # One number for all parameters: universal checkpoints insist on it.
    steps = max(0, int(partition.groups[0]["k"] - method.numbers["k"]))
    group_of = _groups_by_place(partition, partition.groups)
    for param_id, shard in partition.slices.items():
        index = index_of.setdefault(id(shard.flat), len(index_of))
        if index not in entries:
            flat = torch.zeros_like(shard.flat, device="cpu")
            entries[index] = {"step": steps, "exp_avg": flat, "exp_avg_sq": flat.clone(), KEY: {}}
        entry = state.get(shard.param)
        slice_p = method.switches(group_of[param_id]).slice_p
        own = _write(shard, entry, entries[index], slice_p) if entry else None
        entries[index][KEY][param_id] = {"start": shard.start, "numel": shard.numel, "at": shard.at, "state": own}
    groups = partition.numbered_groups()
    groups[0] = {**groups[0], KEY: _for_all_ranks(method, partition, state, groups)}
    return {"state": entries, "param_groups": groups}


def from_deepspeed(method: Method, partition: Partition, state_dict: dict[str, Any], state: State) -> None:
    """Load what ``to_deepspeed`` returned on this rank.

    Raises:
        ValueError: it was returned by a rank with other slices, or the groups do not fit. Nothing is changed then.
    """
    saved = [{name: value for name, value in group.items() if name != KEY} for group in state_dict["param_groups"]]
    groups = read_groups(method, {"param_groups": saved}, _as_given(partition))
    group_of = _groups_by_place(partition, groups)
    entries = {
        param_id: (entry, kept) for entry in state_dict["state"].values() for param_id, kept in entry[KEY].items()
    }
    loaded: State = {}
    for param_id, shard in partition.slices.items():
        entry, kept = entries.get(param_id, ({}, None))
        if kept is None or (kept["start"], kept["numel"], kept["at"]) != (shard.start, shard.numel, shard.at):
            raise ValueError(
                f"the checkpoint has another slice of parameter {param_id} (shape {shard.shape}) than this rank: load "
                "it with the number of ranks and the zero_optimization settings it was saved with (stage, "
                "round_robin_gradients, parameter_alignment, sub_group_size), or make a universal checkpoint of it"
            )
        if kept["state"] is not None:
            slice_p = method.switches(group_of[param_id]).slice_p
            loaded[shard.param] = _read(shard, entry, kept["state"], slice_p)
            with of_the_checkpoint(f"parameter {param_id} of the checkpoint", "what was saved"):
                check_state(method, shard, loaded[shard.param], group_of[param_id])
    _take_over(partition, state, loaded, groups)


def is_universal(partition: Partition, state: State) -> bool:
    """Whether DeepSpeed has written the tensors of a universal checkpoint into the state, under its flat tensors."""
    return any(state.get(shard.flat) for shard in partition.slices.values())


def from_universal(method: Method, partition: Partition, state: State) -> None:
    """Bring what DeepSpeed has written into state and groups into the form in which a step uses it.

    Raises:
        ValueError: the checkpoint was not made by this optimizer, with other parameters, or with round-robin gradients.
    """
    kept = partition.groups[0].get(KEY)
    if kept is None:
        raise ValueError(
            f"the universal checkpoint has no state of {method.name}: it was made with another optimizer; "
            "load it with load_optimizer_states=False"
        )
    refusal = kept["refusal"] or (ROUND_ROBIN_HERE if _is_misplaced(partition) else None)
    if refusal:
        raise ValueError(f"the universal checkpoint cannot be used: {refusal}")
    groups = read_groups(method, {"param_groups": kept["groups"]}, _as_given(partition))
    group_of = _groups_by_place(partition, groups)
    loaded: State = {}
    for param_id, shard in partition.slices.items():
        whole = kept["params"].get(param_id)
        if whole is None:
            continue
        if tuple(whole["shape"]) != shard.shape:
            raise ValueError(
                f"parameter {param_id} has shape {tuple(whole['shape'])} in the universal checkpoint and {shard.shape} "
                "here: build the optimizer with the parameters and groups the checkpoint was made with"
            )
        rest = {name: value for name, value in whole.items() if name != "shape"}
        slice_p = method.switches(group_of[param_id]).slice_p
        for name in SAMPLED:
            if name in rest:
                rest[name] = shard.extract_samples(rest[name], slice_p)
        loaded[shard.param] = _read(shard, state[shard.flat], rest, slice_p)
        with of_the_checkpoint(f"parameter {param_id} of the universal checkpoint", "what was saved"):
            check_state(method, shard, loaded[shard.param], group_of[param_id])
    _take_over(partition, state, loaded, groups)


def _as_given(partition: Partition) -> list[dict[str, Any]]:
    return [{**group, "params": params} for group, params in zip(partition.groups, partition.given, strict=True)]


def _groups_by_place(partition: Partition, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group, params in zip(groups, partition.given, strict=True) for _ in params]


def _take_over(partition: Partition, state: State, loaded: State, groups: list[dict[str, Any]]) -> None:
    for group, values in zip(partition.groups, groups, strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})
        group.pop(KEY, None)
    state.clear()
    state.update(loaded)


def _for_all_ranks(method: Method, partition: Partition, state: State, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What a universal checkpoint needs besides the flat tensors; the parameters' part on rank 0 only."""
    params: dict[int, Entry] = {}
    group_of = _groups_by_place(partition, groups)
    for param_id, shard in partition.slices.items():
        if state.get(shard.param):
            slice_p = method.switches(group_of[param_id]).slice_p
            aside = {name: value for name, value in _aside(shard, state[shard.param]).items() if name != "y"}
            for name in SAMPLED:
                if name in aside:
                    aside[name] = gather_samples(shard, aside[name], slice_p)
            params[param_id] = {**_on_cpu(aside), "shape": shard.shape}
    experts = any(len(shard.domain) != dist.get_world_size() for shard in partition.slices.values())
    # Stage 3 gives every group what the checkpoint says of the first: so all of them lie here as well.
    return {
        "groups": groups,
        "params": params if dist.get_rank() == 0 else {},
        "refusal": ROUND_ROBIN if _is_misplaced(partition) else EXPERTS if experts else None,
    }


def _is_misplaced(partition: Partition) -> bool:
    """Whether DeepSpeed's own map, by which it makes and loads universal checkpoints, is wrong on any rank.

    It is under ``round_robin_gradients``: then it does not know the order in which the parameters lie.
    """
    wrong = 0
    for shard in partition.slices.values():
        if hasattr(shard.param, "_hp_mapping"):
            address = shard.param._hp_mapping and shard.param._hp_mapping.lp_fragment_address
            believed = (address.start, address.numel) if address else (0, 0)
            wrong += believed != (shard.start, shard.numel)
    total = torch.tensor([float(wrong)])
    team_of_ranks(range(dist.get_world_size())).sum_(total)
    return bool(total)


def _aside(shard: ZeroShard, entry: Entry) -> Entry:
    """What of a parameter's state has no place in the flat tensors, and what lies there.

    ``in_exp_avg`` names the tensor in ``exp_avg`` (None for none), ``packed`` the samples in ``exp_avg_sq``, and
    ``in_exp_avg_sq`` says whether a second moment lies there.
    """
    first = next((name for name in ("z", "exp_avg") if name in entry), None)
    samples = [name for name in SAMPLED if name in entry]
    packs = (
        "exp_avg_sq" not in entry
        and shard.flat.dtype == torch.float32
        and all(entry[name].dtype == torch.bfloat16 for name in samples)
    )
    elsewhere = {first, "exp_avg_sq", *(samples if packs else [])}
    aside = {name: value for name, value in entry.items() if name not in elsewhere}
    squares = "exp_avg_sq" in entry
    return {**aside, "in_exp_avg": first, "in_exp_avg_sq": squares, "packed": samples if packs else []}


def _write(shard: ZeroShard, entry: Entry, flats: Entry, slice_p: int) -> Entry:
    """Write a parameter's state into the flat tensors, and return what has no place there."""
    aside = _aside(shard, entry)
    if aside["in_exp_avg"] is not None:
        shard.local(flats["exp_avg"]).copy_(entry[aside["in_exp_avg"]])
    second = shard.local(flats["exp_avg_sq"])
    if "exp_avg_sq" in entry:
        second.copy_(entry["exp_avg_sq"])
    elif aside["packed"]:
        # Two bf16 in each word, where a sample's second moment would be: p0 in its upper half, s in its lower.
        halves = [entry[name].view(torch.int16).int() for name in aside["packed"]]
        words = halves[0] << 16 if len(halves) == 1 else (halves[0] << 16) | (halves[1] & 0xFFFF)
        second[shard.samples(slice_p)] = words.view(torch.float32).cpu()
    return _on_cpu(aside)


def _read(shard: ZeroShard, flats: Entry, aside: Entry, slice_p: int) -> Entry:
    """The inverse of ``_write``, on the device of the weights."""
    device = shard.flat.device
    entry: Entry = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in aside.items()}
    first, packed = entry.pop("in_exp_avg"), entry.pop("packed")
    # The first releases did not say it: every parameter had one of the two forms.
    squares = entry.pop("in_exp_avg_sq", not set(REPLICATED) & set(entry))
    if first is not None:
        entry[first] = shard.local(flats["exp_avg"]).to(device, copy=True)
    second = shard.local(flats["exp_avg_sq"]).to(device, copy=True)
    if squares:
        entry["exp_avg_sq"] = second
    words = second[shard.samples(slice_p)].contiguous().view(torch.int32)
    for name, shift in zip(packed, (16, 0), strict=False):
        entry[name] = (words >> shift).to(torch.int16).view(torch.bfloat16)
    return entry


def _on_cpu(entry: Entry) -> Entry:
    """A copy, so that files hold no more than the tensors themselves."""
    return {name: value.cpu().clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
