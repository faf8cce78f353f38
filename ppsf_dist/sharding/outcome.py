"""What fails on one rank fails on all: each of them raises, and the error names rank and cause.

A rank that raises alone leaves the others waiting in their next collective until its timeout, without the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, TypeVar

from ppsf_dist.sharding.team import Team

Result = TypeVar("Result")

RAISED = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    OSError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    MemoryError,
)
"""What an error of another rank is raised as: the first of these that it is, special ones first, or a RuntimeError."""

NAMED_RANKS = 4
"""Ranks whose causes a message repeats."""


class Failure(NamedTuple):
    """An error as it travels: an exception itself may hold what cannot be pickled."""

    kind: type[Exception]
    text: str
    errno: int | None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        kind = next((kind for kind in RAISED if isinstance(error, kind)), RuntimeError)
        name = type(error).__name__
        return cls(kind, f"{name}: {error}" if str(error) else name, getattr(error, "errno", None))


def together(team: Team, task: Callable[[], Result]) -> Result:
    """Run something on every rank of a team and return this rank's result, once all ranks have one.

    Collective, also where the task does nothing on most ranks. The task itself must not wait for other ranks.

    Raises:
        Exception: the task failed on some rank. Of the same type on every rank, where it is a common one; the message
            names rank and cause. What ends a program, such as ``KeyboardInterrupt``, goes on as it is on its own rank.
    """
    result, _ = _run(team, task, shared=False)
    return result


def told_by_first(team: Team, task: Callable[[], Result]) -> Result:
    """Run something on the first rank of a team and return its result, which must be picklable, on every rank.

    Raises:
        Exception: as ``together``.
    """
    _, results = _run(team, lambda: task() if team.is_first else None, shared=True)
    told = results[0]
    return told  # type: ignore[return-value]


def from_every_rank(team: Team, task: Callable[[], Result]) -> list[Result]:
    """Run something on every rank of a team and return all results, which must be picklable, on every rank.

    Raises:
        Exception: as ``together``.
    """
    _, results = _run(team, task, shared=True)
    return results


def raise_failures(ranks: tuple[int, ...], failures: Mapping[int, BaseException | Failure], rank: int) -> NoReturn:
    """Raise on a rank what has failed on some ranks.

    Args:
        ranks: all that took part.
        failures: by rank.
        rank: this one.
    """
    own = failures.get(rank)
    cause = own if isinstance(own, BaseException) else None
    if cause is not None and not isinstance(cause, Exception):
        raise cause
    told = {where: what if isinstance(what, Failure) else Failure.of(what) for where, what in sorted(failures.items())}
    first = next(iter(told.values()))
    if cause is not None and len(told) == len(ranks) and set(told.values()) == {first}:
        raise cause
    causes = [f"rank {where} of {len(ranks)}: {failure.text}" for where, failure in told.items()]
    more = len(causes) - NAMED_RANKS
    error = first.kind("; ".join(causes[:NAMED_RANKS]) + (f"; and {more} more ranks" if more > 0 else ""))
    if isinstance(error, OSError):
        error.errno = first.errno
    raise error from cause


def _run(team: Team, task: Callable[[], Result], *, shared: bool) -> tuple[Result, list[Result]]:
    """This rank's result and, where they are shared, those of all ranks."""
    if team.is_alone:
        result = task()
        return result, [result]
    results: list[Result] = []
    failure: BaseException | None = None
    try:
        results.append(task())
    except BaseException as error:
        failure = error
    told = Failure.of(failure) if failure is not None else results if shared else None
    outcomes = team.gather(told, why="what has become of a common task on the other ranks")
    failures: dict[int, BaseException | Failure] = {
        rank: outcome for rank, outcome in zip(team.ranks, outcomes, strict=True) if isinstance(outcome, Failure)
    }
    if failures:
        rank = team.ranks[team.group_rank]
        raise_failures(team.ranks, failures | ({rank: failure} if failure is not None else {}), rank)
    return results[0], [value for outcome in outcomes if isinstance(outcome, list) for value in outcome]
