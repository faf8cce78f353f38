"""A check that ranks which should hold the same numbers still do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.adapters import find_team
from ppsf_dist.evaluation import innermost
from ppsf_dist.optimizer import ProdigyPlusScheduleFree
from ppsf_dist.options import ARGUMENTS
from ppsf_dist.scalars import GROUP_NUMBERS
from ppsf_dist.sharding import Shard, Team

CHUNK = 1 << 22
"""Elements that are summed at a time: their 64-bit copies are all the memory that a check takes."""

WHOLE_ON_EVERY_RANK = ("exp_avg_sq_row", "exp_avg_sq_col")
NUMBERS = (*GROUP_NUMBERS, *ARGUMENTS)
ADVICE = (
    "load the last checkpoint, and see what changed one rank alone: weights written outside the optimizer, an argument "
    "set on one rank, or faulty memory"
)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


class _Entry(NamedTuple):
    """Numbers that every rank with the same ``key`` holds alike."""

    key: int
    checksum: int


@torch.no_grad()
def check_replicas(optimizer: Any, process_group: dist.ProcessGroup | None = None) -> None:
    """Compare d, the arguments, and all replicas of weights and optimizer state between ranks, bit for bit.

    Every rank must call it, every hundred steps for instance. It reads all weights and state once and exchanges a
    checksum for each parameter. Under FSDP alone nothing but the numbers of the groups and the factored moments is
    replicated.

    Args:
        optimizer: a :class:`ppsf_dist.ProdigyPlusScheduleFree`, or something that wraps one.
        process_group: ranks to compare. Default: those that share the step size, or all where every rank holds whole
            parameters, as under DDP.

    Raises:
        RuntimeError: ranks disagree. Raised on every rank alike; it names the ranks and the first argument or parameter
            that differs.
        TypeError: there is no ProdigyPlusScheduleFree in ``optimizer``.
    """
    ours = innermost(optimizer)
    if not isinstance(ours, ProdigyPlusScheduleFree):
        raise TypeError(f"optimizer is a {type(ours).__name__}: give a ProdigyPlusScheduleFree, or what wraps one")
    layout = ours._engine.current_layout()
    members = layout.members(layout.whole)
    shards = layout.shards([member.param for member in members], ours._engine.process_group)
    names = [
        f"parameter {member.identity} ({shard.weights().dtype} {shard.shape} in group {member.group})"
        for member, shard in zip(members, shards, strict=True)
    ]
    identities = [member.identity for member in members]
    team = _team(ours, shards, process_group)

    ours.get_d()
    groups = [{name: group[name] for name in NUMBERS} for group in ours._engine.groups]
    entries = _entries(shards, identities, [ours.state.get(shard.param, {}) for shard in shards])
    gathered = team.gather((groups, entries))
    everyone: list[tuple[list[dict[str, Any]], list[_Entry]]] = [v for v in gathered if isinstance(v, tuple)]
    ranks = team.ranks or (0,)
    _compare_groups(ranks, [theirs for theirs, _ in everyone])
    differing = _first_difference([theirs for _, theirs in everyone])
    if differing is None:
        return
    key, sides = differing
    # All ranks have found the same difference; one that holds the parameter knows what it is.
    own = next((name for entry, name in zip(entries, names * 2, strict=True) if entry.key == key), None)
    known = [name for name in team.gather(own) if name is not None]
    where = " and ".join(_ranks([ranks[position] for position in positions]) for positions in sides)
    raise RuntimeError(f"{known[0]}: weights or state are not the same on {where}: {ADVICE}")


def _compare_groups(ranks: Sequence[int], groups: Sequence[list[dict[str, Any]]]) -> None:
    first = groups[0]
    for rank, theirs in zip(ranks, groups, strict=True):
        if len(theirs) != len(first):
            raise RuntimeError(
                f"ranks {ranks[0]} and {rank} have {len(first)} and {len(theirs)} parameter groups: give both the same"
            )
        for index, (a, b) in enumerate(zip(first, theirs, strict=True)):
            name = next((name for name in NUMBERS if a[name] != b[name]), None)
            if name is not None:
                raise RuntimeError(
                    f"{name} of parameter group {index} is {a[name]!r} on rank {ranks[0]} and {b[name]!r} on rank "
                    f"{rank}: {ADVICE}"
                )


def _team(optimizer: ProdigyPlusScheduleFree, shards: Sequence[Shard], process_group: dist.ProcessGroup | None) -> Team:
    if process_group is not None:
        return Team(process_group)
    team = optimizer._engine.team or find_team(shards, optimizer._engine.process_group)
    return Team(dist.group.WORLD) if team.is_alone and dist.is_initialized() else team


def _entries(shards: Sequence[Shard], identities: Sequence[int], states: Sequence[dict[str, Any]]) -> list[_Entry]:
    """One entry for what this rank holds of each parameter, then one for its factored moments, in order."""
    keys: list[int] = []
    sums: list[Tensor] = []
    for whole in (False, True):
        for shard, identity, state in zip(shards, identities, states, strict=True):
            boxes = [] if whole else [(box.offset, box.size) for box in shard.boxes]
            keys.append(_key((whole, shard.domain, identity, shard.shape, boxes)))
            tensors = [
                value
                for name, value in sorted(state.items())
                if isinstance(value, Tensor) and (name in WHOLE_ON_EVERY_RANK) == whole
            ]
            sums.append(checksum(tensors if whole else [shard.weights(), *tensors], shard.weights().device))
    # One wait for the device.
    values = torch.stack(sums).tolist() if sums else []
    return [_Entry(key, value) for key, value in zip(keys, values, strict=True)]


def _key(held: object) -> int:
    """A number that stands for a description, on every host alike."""
    return int.from_bytes(hashlib.blake2b(repr(held).encode(), digest_size=8).digest())


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """A 64-bit sum of the bits of all elements, in which no one changed element and no two swapped ones can hide."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
        total = total * _MIX + bits.numel()
        for piece in torch.split(bits, CHUNK):
            weights = torch.arange(piece.numel(), device=device) * 2 + 1
            total = total * _MIX + (piece.to(device=device, dtype=torch.int64) * weights).sum()
    return total


def _first_difference(entries: Sequence[Sequence[_Entry]]) -> tuple[int, list[list[int]]] | None:
    """The first key under which ranks have different checksums, and the positions of the ranks by checksum."""
    seen: dict[int, dict[int, list[int]]] = {}
    for position, own in enumerate(entries):
        for key, value in own:
            seen.setdefault(key, {}).setdefault(value, []).append(position)
    return next(((key, list(by_value.values())) for key, by_value in seen.items() if len(by_value) > 1), None)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
