"""One slot for each logical parameter of a team, agreed between its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ppsf_dist.sharding.geometry import Shape
from ppsf_dist.sharding.shard import Shard
from ppsf_dist.sharding.team import Team


class Slot(NamedTuple):
    """A logical parameter as all ranks see it.

    Attributes:
        group: index of its parameter group.
        shape: of the whole parameter.
        dtype: of its weights.
        identity: a number that stays with the parameter whatever the layout (its position among all parameters of the
            optimizer): stochastic rounding depends on it.
    """

    group: int
    shape: Shape
    dtype: str
    identity: int


@dataclass(frozen=True)
class SlotTable:
    """All logical parameters of a team, and which of them the local shards belong to."""

    slots: tuple[Slot, ...]
    of_shard: tuple[int, ...]


Description = dict[tuple[int, ...], list[Slot]]


def agree_on_slots(
    shards: Sequence[Shard],
    groups: Sequence[int],
    identities: Sequence[int],
    settings: Sequence[object],
    team: Team,
) -> SlotTable:
    """Number the logical parameters of a team in the same way on every rank. Waits for all ranks.

    Ranks that hold the same parameters (one domain) must list them in the same order; different domains (pipeline
    stages, experts) get slots of their own.

    Args:
        shards: the local shards, in the order of ``param_groups``.
        groups: the group of each.
        identities: the number of each that is the same in every layout.
        settings: one comparable description of each group's arguments.
        team: the ranks that take part.

    Raises:
        RuntimeError: ranks disagree about groups, arguments or parameters. Raised on every rank alike; it names the
            ranks and the first difference.
    """
    mine: Description = {}
    for shard, group, identity in zip(shards, groups, identities, strict=True):
        slot = Slot(group, shard.shape, str(shard.weights().dtype), identity)
        mine.setdefault(shard.domain, []).append(slot)
    everyone = team.gather((mine, list(settings)))
    described: list[tuple[Description, list[object]]] = [d for d in everyone if isinstance(d, tuple)]
    _check_settings(team, [settings for _, settings in described])
    table: dict[tuple[int, ...], list[Slot]] = {}
    first_rank: dict[tuple[int, ...], int] = {}
    for position, (description, _) in enumerate(described):
        rank = team.ranks[position] if team.ranks else 0
        for domain, slots in description.items():
            if domain not in table:
                table[domain], first_rank[domain] = slots, rank
            elif table[domain] != slots:
                raise RuntimeError(_difference(first_rank[domain], table[domain], rank, slots))
    if team.is_alone or list(table) == list(mine):
        domains = list(mine)
    else:
        domains = sorted(table)
    start, offsets = 0, {}
    for domain in domains:
        offsets[domain] = start
        start += len(table[domain])
    taken = dict(offsets)
    of_shard = []
    for shard in shards:
        of_shard.append(taken[shard.domain])
        taken[shard.domain] += 1
    return SlotTable(tuple(slot for domain in domains for slot in table[domain]), tuple(of_shard))


def _check_settings(team: Team, settings: list[list[object]]) -> None:
    for position, other in enumerate(settings[1:], start=1):
        if other == settings[0]:
            continue
        ranks = f"rank {team.ranks[0]} and rank {team.ranks[position]}"
        if len(other) != len(settings[0]):
            raise RuntimeError(f"{ranks} have {len(settings[0])} and {len(other)} parameter groups: give both the same")
        index = next(i for i, (a, b) in enumerate(zip(settings[0], other, strict=True)) if a != b)
        raise RuntimeError(
            f"{ranks} disagree about the arguments of parameter group {index}: "
            f"{settings[0][index]} and {other[index]}: build the optimizer in the same way on every rank"
        )


def _difference(rank_a: int, a: list[Slot], rank_b: int, b: list[Slot]) -> str:
    advice = "give the optimizer the same parameters in the same order and groups on both"
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return (
                f"ranks {rank_a} and {rank_b} hold the same parameters, but parameter {index} is {_name(x)} on one and "
                f"{_name(y)} on the other: {advice}"
            )
    return f"ranks {rank_a} and {rank_b} hold the same parameters, but list {len(a)} and {len(b)} of them: {advice}"


def _name(slot: Slot) -> str:
    return f"{slot.dtype} {slot.shape} in group {slot.group}"
