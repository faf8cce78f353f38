"""What fails on one rank fails on all, with rank and cause."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from ppsf_dist.sharding import Team, everyone, from_every_rank, raise_failures, together, told_by_first
from tests.harness.pool import run


class Odd(Exception):
    """Cannot be made from its text, or pickled."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")
        self.held = lambda: None


def fail(error: BaseException) -> NoReturn:
    raise error


FAILURES: dict[str, Callable[[int], Any]] = {
    "one": lambda rank: fail(FileNotFoundError("gone")) if rank == 1 else rank,
    "first": lambda rank: fail(ValueError("bad")) if rank == 0 else rank,
    "all": lambda rank: fail(TypeError("same")),
    "two": lambda rank: fail(TypeError(f"on {rank}")) if rank else rank,
    "full": lambda rank: fail(OSError(errno.ENOSPC, "No space left")) if rank == 2 else rank,
    "odd": lambda rank: fail(Odd(1, 2)) if rank == 1 else rank,
    "stopped": lambda rank: fail(KeyboardInterrupt()) if rank == 1 else rank,
}
EXPECTED = {
    "one": ("FileNotFoundError", "rank 1 of 3: FileNotFoundError: gone"),
    "first": ("ValueError", "rank 0 of 3: ValueError: bad"),
    "all": ("TypeError", "same"),
    "two": ("TypeError", "rank 1 of 3: TypeError: on 1; rank 2 of 3: TypeError: on 2"),
    "full": ("OSError", "rank 2 of 3: OSError: [Errno 28] No space left"),
    "odd": ("RuntimeError", "rank 1 of 3: Odd: 1 and 2"),
    "stopped": ("RuntimeError", "rank 1 of 3: KeyboardInterrupt"),
}


def outcomes() -> dict[str, tuple[str, str]]:
    rank, team = dist.get_rank(), everyone()
    raised: dict[str, tuple[str, str]] = {}
    for name, task in FAILURES.items():
        try:
            together(team, lambda task=task: task(rank))  # type: ignore[misc]
        except BaseException as error:
            raised[name] = type(error).__name__, str(error)
            assert name != "full" or isinstance(error, OSError) and error.errno == errno.ENOSPC
    # The ranks are in step after all of that.
    assert together(team, lambda: [rank]) == [rank]
    assert told_by_first(team, lambda: f"from {rank}") == "from 0"
    assert from_every_rank(team, lambda: rank) == [0, 1, 2]
    with pytest.raises(ValueError, match="rank 0 of 3: ValueError: 0"):
        told_by_first(team, lambda: fail(ValueError(str(rank))))
    return raised


@pytest.mark.dist
def test_all_ranks_raise_what_one_has_raised() -> None:
    for rank, raised in enumerate(run(3, outcomes)):
        own = ("KeyboardInterrupt", "") if rank == 1 else EXPECTED["stopped"]
        assert raised == EXPECTED | {"stopped": own}


def test_a_process_alone_raises_as_ever() -> None:
    error = Odd(1, 2)
    with pytest.raises(Odd) as raised:
        together(Team(), lambda: fail(error))
    assert raised.value is error
    assert told_by_first(Team(), lambda: 3) == 3 and from_every_rank(Team(), lambda: 3) == [3]


def test_a_message_names_a_few_of_many_ranks() -> None:
    with pytest.raises(ValueError, match=r"rank 0 of 64.*rank 3 of 64.*and 60 more ranks") as raised:
        raise_failures(tuple(range(64)), {rank: ValueError(str(rank)) for rank in range(64)}, 5)
    assert "rank 4 of" not in str(raised.value) and str(raised.value.__cause__) == "5"
