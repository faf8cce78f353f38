"""A check that ranks which should hold the same numbers still do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.evaluation import innermost
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.sharding import Shard, Team, find_team
from ppsf_dist.sharding.fingerprint import Entry, checksum, first_difference, key, name_ranks
from ppsf_dist.sharding.slots import Disagreement, Slot, compare_groups, compare_names, compare_settings
from ppsf_dist.state.inventory import REPLICATED

ADVICE = (
    "load the last checkpoint, and see what changed one rank alone: weights written outside the optimizer, an argument "
    "set on one rank, or faulty memory"
)


@torch.no_grad()
def check_replicas(optimizer: Any, process_group: dist.ProcessGroup | None = None) -> None:
    """Compare d, the arguments, seed and release, and all replicas of weights and optimizer state, bit for bit.

    Every rank must call it, every hundred steps for instance. It reads all weights and state once and exchanges a
    checksum for each parameter. Under FSDP alone nothing but the numbers of the groups and the factored moments is
    replicated.

    Args:
        optimizer: an optimizer of this package, or something that wraps one.
        process_group: ranks to compare. Default: those that share the step size, or all where every rank holds whole
            parameters, as under DDP.

    Raises:
        RuntimeError: ranks disagree. Raised on every rank alike; it names the ranks and the first argument or parameter
            that differs.
        TypeError: there is no optimizer of this package in ``optimizer``.
    """
    ours = innermost(optimizer)
    if not isinstance(ours, DistributedOptimizer):
        raise TypeError(f"optimizer is a {type(ours).__name__}: give an optimizer of ppsf_dist, or what wraps one")
    engine = ours._engine
    layout = engine.current_layout()
    members = layout.members(layout.all_parts)
    shards = layout.shards([member.param for member in members], engine.process_group)
    slots = engine.slots(layout, members, shards)
    team = _team(ours, shards, process_group)

    engine.settle()
    names = {(shard.domain, slot.param_id): slot.name for shard, slot in zip(shards, slots, strict=True) if slot.name}
    entries = _entries(shards, slots, [ours.state.get(shard.param, {}) for shard in shards])
    mine = (engine.common(), engine.settings(), names, entries)
    gathered = team.gather(mine, why="check_replicas() of the other ranks")
    everyone: list[tuple[Any, Any, Any, list[Entry]]] = [told for told in gathered if isinstance(told, tuple)]
    try:
        compare_settings(team, [common for common, _, _, _ in everyone], "of the optimizer")
        compare_groups(team, [groups for _, groups, _, _ in everyone])
        compare_names(team, [theirs for _, _, theirs, _ in everyone])
    except Disagreement as error:
        raise Disagreement(f"{error}; {ADVICE}") from None
    differing = first_difference([theirs for _, _, _, theirs in everyone])
    if differing is None:
        return
    found, sides = differing
    # All ranks have found the same difference; one that holds the parameter knows what it is.
    own = next((str(slot) for entry, slot in zip(entries, slots * 2, strict=True) if entry.key == found), None)
    known = [name for name in team.gather(own, why="the name of what differs") if name is not None]
    ranks = team.ranks or (0,)
    where = " and ".join(name_ranks([ranks[group_rank] for group_rank in group_ranks]) for group_ranks in sides)
    raise Disagreement(f"{known[0]}: weights or state are not the same on {where}: {ADVICE}")


def _team(optimizer: DistributedOptimizer, shards: Sequence[Shard], process_group: dist.ProcessGroup | None) -> Team:
    if process_group is not None:
        return Team(process_group)
    team = optimizer._engine.team or find_team(shards, optimizer._engine.process_group)
    return Team(dist.group.WORLD) if team.is_alone and dist.is_initialized() else team


def _entries(shards: Sequence[Shard], slots: Sequence[Slot], states: Sequence[dict[str, Any]]) -> list[Entry]:
    """One entry for what this rank holds of each parameter, then one for its factored moments, in order."""
    keys: list[int] = []
    sums: list[Tensor] = []
    for replicated in (False, True):
        for shard, slot, state in zip(shards, slots, states, strict=True):
            boxes = [] if replicated else [(box.offset, box.size) for box in shard.boxes]
            keys.append(key((replicated, shard.domain, slot.param_id, shard.shape, boxes)))
            tensors = [
                value
                for name, value in sorted(state.items())
                if isinstance(value, Tensor) and (name in REPLICATED) == replicated
            ]
            sums.append(checksum(tensors if replicated else [shard.weights(), *tensors], shard.weights().device))
    # One wait for the device.
    values = torch.stack(sums).tolist() if sums else []
    return [Entry(*entry) for entry in zip(keys, values, strict=True)]
