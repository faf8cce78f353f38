"""One slot for each logical parameter of a team, and everything else that its ranks must agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ppsf_dist.sharding.fingerprint import Entry, checksum, first_difference, key, name_ranks
from ppsf_dist.sharding.geometry import Shape
from ppsf_dist.sharding.shard import Shard
from ppsf_dist.sharding.team import Team

Settings = Mapping[str, object]


class Disagreement(RuntimeError):
    """Ranks differ in what they must agree on, or one of them has failed. Raised on every rank alike."""


class Slot(NamedTuple):
    """A logical parameter as all ranks see it.

    Attributes:
        group: index of its parameter group.
        shape: of the whole parameter.
        dtype: of its weights.
        param_id: its number among all parameters of the optimizer, as in a state dict of torch. It stays whatever the
            layout: stochastic rounding depends on it.
        name: in the model; empty where the optimizer was not told.
    """

    group: int
    shape: Shape
    dtype: str
    param_id: int
    name: str = ""

    def __str__(self) -> str:
        name = f" '{self.name}'" if self.name else ""
        return f"parameter {self.param_id}{name} ({self.dtype} {self.shape} in group {self.group})"


@dataclass(frozen=True)
class SlotTable:
    """All logical parameters of a team, and which of them the local shards belong to."""

    slots: tuple[Slot, ...]
    of_shard: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """What a rank brings to the making of a plan.

    Attributes:
        slots: its parameters by the ranks among which they are divided or repeated.
        common: what belongs to the whole optimizer, by name: seed, release.
        settings: the arguments and numbers of each group, by name.
        failure: what kept this rank from bringing more.
    """

    slots: Mapping[tuple[int, ...], list[Slot]]
    common: Settings
    settings: Sequence[Settings]
    failure: str | None = None


def agree_on_slots(
    shards: Sequence[Shard], slots: Sequence[Slot], common: Settings, settings: Sequence[Settings], team: Team
) -> SlotTable:
    """Number the logical parameters of a team in the same way on every rank. Waits for all ranks.

    Ranks that hold the same parameters (one domain) must list them in the same order; different domains (pipeline
    stages, experts) get slots of their own.

    Args:
        shards: the local shards, in the order of ``param_groups``.
        slots: what each of them belongs to.
        common: what ranks must agree on for the whole optimizer, by name.
        settings: the same for each group.
        team: the ranks that take part.

    Raises:
        Disagreement: ranks disagree about groups, arguments or parameters, or one has failed. Raised on every rank
            alike; it names the ranks and the first difference.
    """
    mine: dict[tuple[int, ...], list[Slot]] = {}
    for shard, slot in zip(shards, slots, strict=True):
        mine.setdefault(shard.domain, []).append(slot)
    everyone = _exchange(Agreement(mine, common, settings), team)
    compare_settings(team, [theirs.common for theirs in everyone], "of the optimizer")
    compare_groups(team, [theirs.settings for theirs in everyone])
    table: dict[tuple[int, ...], list[Slot]] = {}
    first_rank: dict[tuple[int, ...], int] = {}
    for group_rank, theirs in enumerate(everyone):
        rank = _rank(team, group_rank)
        for domain, of_domain in theirs.slots.items():
            if domain not in table:
                table[domain], first_rank[domain] = of_domain, rank
            elif difference := _difference(first_rank[domain], table[domain], rank, of_domain):
                raise Disagreement(difference)
    domains = list(mine) if team.is_alone or list(table) == list(mine) else sorted(table)
    start, taken = 0, {}
    for domain in domains:
        taken[domain] = start
        start += len(table[domain])
    of_shard = []
    for shard in shards:
        of_shard.append(taken[shard.domain])
        taken[shard.domain] += 1
    return SlotTable(tuple(slot for domain in domains for slot in table[domain]), tuple(of_shard))


def tell_failure(error: BaseException, team: Team) -> None:
    """Bring nothing but a failure to the making of a plan, so that the other ranks do not wait."""
    team.gather(Agreement({}, {}, [], failure=describe(error)), why="the other ranks' parameters and arguments")


def confirm(error: Exception | None, shards: Sequence[Shard], slots: Sequence[Slot], team: Team) -> None:
    """The end of making a plan: every rank has one, and copies of a parameter begin with the same values.

    Args:
        error: what has kept this rank from making its plan.
        shards: local shards of parameters that have not been stepped yet.
        slots: what each of them belongs to.
        team: the ranks that take part.

    Raises:
        Disagreement: a rank has failed, or copies differ. Raised on every rank alike.
    """
    if team.is_alone:
        if error is not None:
            raise error
        return
    copies = [(shard, slot) for shard, slot in zip(shards, slots, strict=True) if shard.copied and shard.boxes]
    sums = [] if error else [checksum([shard.weights()], shard.weights().device) for shard, _ in copies]
    keys = [key((shard.domain, slot.param_id, shard.shape, shard.boxes)) for shard, slot in copies]
    entries = [Entry(k, v) for k, v in zip(keys, torch.stack(sums).tolist() if sums else [], strict=False)]
    names = dict(zip(keys, map(str, (slot for _, slot in copies)), strict=True))
    told = team.gather((describe(error) if error else None, entries, names), why="the other ranks' plans")
    everyone: list[tuple[str | None, list[Entry], dict[int, str]]] = [t for t in told if isinstance(t, tuple)]
    try:
        _raise_failure([failure for failure, _, _ in everyone], team)
    except Disagreement as others:
        raise error or others from error
    differing = first_difference([theirs for _, theirs, _ in everyone])
    if differing is not None:
        name = next(of_rank[differing[0]] for _, _, of_rank in everyone if differing[0] in of_rank)
        where = " and ".join(name_ranks([_rank(team, group_rank) for group_rank in side]) for side in differing[1])
        raise Disagreement(
            f"{name} does not begin with the same values on {where}: copies of a parameter must start equal; load or "
            "broadcast the same weights on all ranks, and give the optimizer the same parameters in the same order"
        )


def describe(error: BaseException) -> str:
    """An exception in a line, for other ranks."""
    return f"{type(error).__name__}: {error}"


def share_failure(failure: str | None, team: Team) -> None:
    """Exchange what has kept ranks from stepping, once all of them know that something has.

    Raises:
        Disagreement: names the ranks and their reasons. Raised on every rank alike.
    """
    told = team.gather(failure, why="the other ranks' errors")
    _raise_failure([None if text is None else str(text) for text in told], team)


def _raise_failure(failures: Sequence[str | None], team: Team) -> None:
    said = [f"rank {_rank(team, i)}: {text}" for i, text in enumerate(failures) if text is not None]
    if said:
        raise Disagreement(f"no rank has made this step, because of {'; '.join(said)}")


def _exchange(mine: Agreement, team: Team) -> list[Agreement]:
    told = team.gather(mine, why="the other ranks' parameters and arguments")
    everyone = [theirs for theirs in told if isinstance(theirs, Agreement)]
    _raise_failure([theirs.failure for theirs in everyone], team)
    return everyone


def _rank(team: Team, group_rank: int) -> int:
    return team.ranks[group_rank] if team.ranks else 0


def compare_settings(team: Team, everyone: Sequence[Settings], where: str) -> None:
    """Compare named values between ranks.

    Raises:
        Disagreement: names the first that differs, its values, and where it belongs. Raised on every rank alike.
    """
    first = everyone[0]
    for group_rank, theirs in enumerate(everyone[1:], start=1):
        for name, value in first.items():
            # Their text: it tells NaN from nothing, and 1 from True.
            if repr(theirs.get(name)) != repr(value):
                raise Disagreement(
                    f"{name} {where} is {value!r} on rank {_rank(team, 0)} and {theirs.get(name)!r} on rank "
                    f"{_rank(team, group_rank)}: build, load and change the optimizer in the same way on every rank"
                )


def compare_groups(team: Team, everyone: Sequence[Sequence[Settings]]) -> None:
    """Compare the arguments and numbers of all groups between ranks.

    Raises:
        Disagreement: names the first that differs. Raised on every rank alike.
    """
    first = everyone[0]
    for group_rank, theirs in enumerate(everyone[1:], start=1):
        if len(theirs) != len(first):
            raise Disagreement(
                f"rank {_rank(team, 0)} and rank {_rank(team, group_rank)} have {len(first)} and {len(theirs)} "
                "parameter groups: give both the same"
            )
    for index in range(len(first)):
        compare_settings(team, [theirs[index] for theirs in everyone], f"of parameter group {index}")


def compare_names(team: Team, everyone: Sequence[Mapping[object, str]]) -> None:
    """Compare the names of parameters that several ranks know, under the same keys.

    Raises:
        Disagreement: names the first that differs. Raised on every rank alike.
    """
    first: dict[object, tuple[int, str]] = {}
    for group_rank, names in enumerate(everyone):
        for parameter, name in names.items():
            rank, known = first.setdefault(parameter, (_rank(team, group_rank), name))
            if known != name:
                raise Disagreement(
                    f"a parameter is '{known}' on rank {rank} and '{name}' on rank {_rank(team, group_rank)}: give the "
                    "optimizer the same parameters in the same order on both"
                )


def _difference(rank_a: int, a: list[Slot], rank_b: int, b: list[Slot]) -> str | None:
    advice = "give the optimizer the same parameters in the same order and groups on both"
    for x, y in zip(a, b, strict=False):
        same_name = x.name == y.name or not (x.name and y.name)
        if x._replace(name="") != y._replace(name="") or not same_name:
            return (
                f"ranks {rank_a} and {rank_b} hold the same parameters, but where one has {x}, the other has {y}: "
                f"{advice}"
            )
    if len(a) != len(b):
        return f"ranks {rank_a} and {rank_b} hold the same parameters, but list {len(a)} and {len(b)} of them: {advice}"
    return None
