"""What the engine remembers between the calls that make up a step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ppsf_dist.engine.step import PartStep
from ppsf_dist.methods.base import StepNumbers
from ppsf_dist.sharding import Part


class OpenStep(NamedTuple):
    """A step that has begun.

    Attributes:
        numbers: of its groups.
        stepped: the parts of it that have come.
        totals: what each of them adds.
        waiting: those that are not written before all have come, where the method's d is that of the same step.
    """

    numbers: StepNumbers
    stepped: Part = frozenset()
    totals: tuple[Tensor, ...] = ()
    waiting: tuple[PartStep, ...] = ()

    def after(self, part: Part, step: PartStep, *, waits: bool) -> OpenStep:
        """The same step when one more part has come."""
        return self._replace(
            stepped=self.stepped | part,
            totals=(*self.totals, step.contribution.totals),
            waiting=(*self.waiting, step) if waits else self.waiting,
        )


class Begun(NamedTuple):
    """A part of a step whose first sums are on their way.

    Attributes:
        part, step: its own.
        opened: the step as it was before this part.
    """

    part: Part
    step: PartStep
    opened: OpenStep
