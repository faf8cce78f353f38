"""What observers are told of a step: it comes with the one copy of numbers that goes to the host anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ppsf_dist.methods.base import Cause, Method

_SAID_ONCE = ("k", "skipped_steps", "cause", "failures")


@dataclass(frozen=True)
class StepReport:
    """One call of ``step()``, or all calls that a framework has made of it.

    Attributes:
        steps: how many steps have been made so far, this one included.
        skipped: how many have changed nothing so far, because of a gradient or a number that was not finite.
        cause: why this step changed nothing, or None if it did not.
        groups: of each parameter group its adaptive numbers by the names that ``param_groups`` have for them (``d`` and
            Prodigy's sums, ``weight_sum``, ...), and

            ``gradient_norm``: length of its gradient; not finite where an element is not, or the sum of the squares.
            ``update_norm``: length of its update before weight decay and masks; None where nothing measures it (with
            neither StableAdamW nor OrthoGrad) and where the step changed nothing.

            All of them are those of the whole parameters, equal on every rank.
    """

    steps: int
    skipped: int
    cause: Cause | None
    groups: tuple[Mapping[str, float | None], ...]


Observer = Callable[[StepReport], object]


def report_of(method: Method, news: Sequence[Mapping[str, float]], before: Mapping[str, float]) -> StepReport:
    """The report of a step.

    Args:
        method: what the numbers are.
        news: the numbers of each group after the step.
        before: those of the first group after the step before.
    """
    first = news[0]
    void = first["k"] == before["k"]
    return StepReport(
        steps=int(first["k"] - method.numbers["k"]),
        skipped=int(first["skipped_steps"]),
        cause=Cause(int(first["cause"])) if void else None,
        groups=tuple(
            {name: _told(method, name, value, void) for name, value in group.items() if name not in _SAID_ONCE}
            for group in news
        ),
    )


def _told(method: Method, name: str, value: float, void: bool) -> float | None:
    if name == "update_norm":
        return None if void or math.isnan(value) else value
    return method.plain_number(name, value)
