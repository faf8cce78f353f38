"""What ranks agree on when a plan is made, with ranks that are only played."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from ppsf_dist.sharding import Shard, Team, plain_shard
from ppsf_dist.sharding.slots import Disagreement, Slot, agree_on_slots, compare_names, confirm, tell_failure

SLOTS = [Slot(0, (4, 3), "torch.float32", 0), Slot(1, (5,), "torch.float32", 1)]
COMMON: dict[str, object] = {"seed": 0}
SETTINGS: list[dict[str, object]] = [{"lr": 1.0}, {"lr": 0.5}]


@dataclass
class Played(Team):
    """A team whose other ranks bring what a test lets them bring."""

    others: list[Any] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(None)
        self.ranks = tuple(range(len(self.others) + 1))

    def gather(self, mine: Any, why: str) -> list[Any]:
        self.told.append(mine)
        return [mine, *self.others]


def shards(*domains: tuple[int, ...]) -> list[Shard]:
    made = []
    for slot, domain in zip(SLOTS, domains, strict=True):
        shard = plain_shard(nn.Parameter(torch.ones(slot.shape)))
        shard.domain = domain
        made.append(shard)
    return made


def brought(of: list[Shard], slots: list[Slot], **different: Any) -> Any:
    """What a rank brings that has these."""
    team = Played([])
    common = COMMON | different.get("common", {})
    agree_on_slots(of, slots, common, different.get("settings", SETTINGS), team)
    return team.told[0]


def agreed(theirs: Any) -> Any:
    return agree_on_slots(shards((0, 1), (0, 1)), SLOTS, COMMON, SETTINGS, Played([theirs]))


def test_equal_ranks_number_their_parameters_alike() -> None:
    table = agreed(brought(shards((0, 1), (0, 1)), SLOTS))
    assert table.slots == tuple(SLOTS) and table.of_shard == (0, 1)


def test_parameters_of_other_ranks_alone_have_slots_too() -> None:
    """Two stages of a pipeline: each rank finds its own behind or in front of the other's, by domain."""
    theirs = brought(shards((1,), (1,)), SLOTS)
    table = agree_on_slots(shards((0,), (0,)), SLOTS, COMMON, SETTINGS, Played([theirs]))
    assert len(table.slots) == 4 and table.of_shard == (0, 1)
    mirrored = agree_on_slots(shards((1,), (1,)), SLOTS, COMMON, SETTINGS, Played([brought(shards((0,), (0,)), SLOTS)]))
    assert mirrored.slots == table.slots and mirrored.of_shard == (2, 3)


@pytest.mark.parametrize(
    ("slots", "different", "message"),
    [
        ([SLOTS[1], SLOTS[0]], {}, r"where one has parameter 0 .*, the other has parameter 1"),
        (
            [SLOTS[0], SLOTS[1]._replace(dtype="torch.bfloat16")],
            {},
            r"the other has parameter 1 \(torch.bfloat16 \(5,\)",
        ),
        (SLOTS, {"common": {"seed": 7}}, r"seed of the optimizer is 0 on rank 0 and 7 on rank 1"),
        (SLOTS, {"settings": [{"lr": 1.0}, {"lr": 0.25}]}, r"lr of parameter group 1 is 0.5 on rank 0 and 0.25 on"),
        (SLOTS, {"settings": [{"lr": 1.0}]}, r"rank 0 and rank 1 have 2 and 1 parameter groups"),
        (SLOTS, {"settings": [{"lr": 1}, {"lr": 0.5}]}, r"lr of parameter group 0 is 1.0 on rank 0 and 1 on rank 1"),
    ],
)
def test_the_first_difference_is_named(slots: list[Slot], different: dict[str, Any], message: str) -> None:
    of = shards((0, 1), (0, 1))
    with pytest.raises(Disagreement, match=message):
        agreed(brought(of, slots, **different))


def test_nan_equals_nan() -> None:
    both: list[dict[str, object]] = [{"d": float("nan")}, {"d": 1.0}]
    of = shards((0, 1), (0, 1))
    agree_on_slots(of, SLOTS, COMMON, both, Played([brought(of, SLOTS, settings=both)]))


def test_a_parameter_more_is_counted() -> None:
    theirs = brought(shards((0, 1), (0, 1)), SLOTS)
    theirs.slots[0, 1].append(SLOTS[0]._replace(param_id=2))
    with pytest.raises(Disagreement, match="hold the same parameters, but list 2 and 3 of them"):
        agreed(theirs)


def test_names_are_compared_where_both_have_them() -> None:
    named = [slot._replace(name=name) for slot, name in zip(SLOTS, ("up", "down"), strict=True)]
    of = shards((0, 1), (0, 1))
    agreed(brought(of, named))  # Here there are none.
    other = [slot._replace(name=name) for slot, name in zip(SLOTS, ("up", "side"), strict=True)]
    with pytest.raises(Disagreement, match="'down' .* the other has parameter 1 'side'"):
        agree_on_slots(of, named, COMMON, SETTINGS, Played([brought(of, other)]))
    with pytest.raises(Disagreement, match="a parameter is 'up' on rank 0 and 'down' on rank 1"):
        compare_names(Played([None]), [{0: "up"}, {0: "down"}])


def test_what_keeps_a_rank_from_a_plan_ends_all_of_them() -> None:
    failing = Played([None])
    tell_failure(ValueError("no memory"), failing)
    with pytest.raises(Disagreement, match="because of rank 1: ValueError: no memory"):
        agreed(failing.told[0])


def told(values: torch.Tensor, error: Exception | None = None) -> Any:
    """What a rank says of its plan that begins with these values."""
    of, team = copies(), Played([(None, [], {})])
    of[0].param.data.copy_(values)
    with contextlib.suppress(MemoryError):
        confirm(error, of, SLOTS, team)
    return team.told[0]


def copies() -> list[Shard]:
    of = shards((0, 1), (0, 1))
    for shard in of:
        shard.copied = True
    return of


def test_copies_must_begin_equal() -> None:
    confirm(None, copies(), SLOTS, Played([told(torch.ones(4, 3))]))
    with pytest.raises(Disagreement, match=r"parameter 0 .* does not begin with the same values on rank 0 and rank 1"):
        confirm(None, copies(), SLOTS, Played([told(torch.zeros(4, 3))]))


def test_a_rank_that_could_not_plan_is_named() -> None:
    with pytest.raises(Disagreement, match="because of rank 1: MemoryError: full"):
        confirm(None, copies(), SLOTS, Played([told(torch.ones(4, 3), MemoryError("full"))]))


def test_its_own_failure_is_raised_as_it_was() -> None:
    with pytest.raises(MemoryError, match="full"):
        confirm(MemoryError("full"), copies(), SLOTS, Played([told(torch.ones(4, 3))]))
