"""The all-reduces of a step: what travels in each, in which order, and how a rank that cannot step tells the others."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ppsf_dist.methods.sums import Stat
from ppsf_dist.sharding import Team
from ppsf_dist.sharding.team import Pending

OF_A_PORTION = 1 << 16
"""Sums of g^2 that are worth an all-reduce of their own, which goes on while pass 1 sums the next: 256 kB."""

MOST_PORTIONS = 4


def portions_of(sizes: Sequence[int], sums: Sequence[int]) -> list[int]:
    """Where the portions of a plan begin whose sums of g^2 travel one after the other, about equal in elements.

    Args:
        sizes: elements of each parameter.
        sums: numbers that each has in the flat buffer.

    Returns:
        The first parameter of each portion.
    """
    count = max(1, min(MOST_PORTIONS, sum(sums) // OF_A_PORTION))
    total, before, begins = sum(sizes), 0, [0]
    for index, size in enumerate(sizes):
        if len(begins) < count and index and before * count >= total * len(begins):
            begins.append(index)
        before += size
    return begins


class Outcome(IntEnum):
    """How many ranks have a reason to change nothing. Rides at the end of the table of sums."""

    FAILED = 0
    """An exception ended the step before the ranks knew enough to write."""
    REPLANS = 1
    """Parameters, groups or switches are other ones than in the step before."""
    UNSOUND = 2
    """A number of a group (lr, weight_decay, d, ...) is not finite."""


class Table:
    """The sums of each parameter (rows by ``Stat``) and the outcomes, fp64, in one flat buffer."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.flat = torch.zeros(slots * len(Stat) + len(Outcome), dtype=torch.float64, device=device)
        self.stats = self.flat[: slots * len(Stat)].view(slots, len(Stat))
        self.outcome = self.flat[slots * len(Stat) :]


class Reductions:
    """The buffers in which a plan's sums travel, and its all-reduces in their order.

    Args:
        team: the ranks that sum.
        slots: number of parameters.
        moments: lengths of the parts of the flat buffer of factored moments that are summed one after the other.
        device: of the parameters.
        sums_early: whether the sums of g^2 are needed before pass 2.
        needs_norms: whether there is a pass 2.
        masks_late: whether a mask is counted after it.
    """

    def __init__(
        self,
        team: Team,
        slots: int,
        moments: Sequence[int],
        device: torch.device,
        *,
        sums_early: bool,
        needs_norms: bool,
        masks_late: bool,
    ) -> None:
        self.team = team
        self.sums = torch.zeros(sum(moments), dtype=torch.float32, device=device)
        self.table = Table(slots, device)
        self.masks = Table(slots, device) if masks_late else None
        # What nothing waits for rides on an all-reduce that comes anyway.
        sequence: list[tuple[Tensor, ...]]
        if not sums_early:
            sequence = [(self.table.flat, self.sums) if len(self.sums) else (self.table.flat,)]
        elif needs_norms:
            sequence = [*[(part,) for part in self.sums.split(list(moments))], (self.table.flat,)]
        else:
            sequence = [(self.sums, self.table.flat)]
        if self.masks is not None:
            sequence.append((self.masks.flat,))
        self._sequence: Sequence[tuple[Tensor, ...]] = sequence
        self._done = 0
        self._pending: list[Pending] = []

    @property
    def decided(self) -> bool:
        """Whether every sum is there: from now on all ranks know the same, and write."""
        return self._done == len(self._sequence)

    @property
    def last(self) -> Table:
        """The table that all ranks see last."""
        return self.table if self.masks is None else self.masks

    def expect(self) -> None:
        """A step begins in which the other ranks wait for every one of these sums."""
        self.finish()
        self._done = 0

    def begin(self) -> None:
        """Empty the buffers for a step."""
        self.expect()
        self.sums.zero_()
        self.table.flat.zero_()
        if self.masks is not None:
            self.masks.flat.zero_()

    def start(self) -> None:
        """Begin the next all-reduce, of one tensor: it goes on until ``finish``."""
        place = self._done + len(self._pending)
        (tensor,) = self._sequence[place]
        if self.team.is_alone:
            self._done += 1
            return
        self._pending.append(Pending(self.team, tensor, self._why(place)))
        self._pending[-1].start()

    def finish(self) -> None:
        """Wait for those that have begun."""
        while self._pending:
            first = self._pending[0]
            try:
                if first.has_started and not first.has_arrived:
                    first.finish()
            finally:
                # Each knows for itself: a ctrl-C may come between two of them.
                if first.has_arrived or not first.has_started:
                    self._done += self._pending.pop(0).has_arrived

    def reduce(self) -> None:
        """The next all-reduce. Whether an exception in it came before or after the sums, ``decided`` knows."""
        self.finish()
        try:
            self.team.sum_(*self._sequence[self._done], why=self._why(self._done))
        finally:
            if self.team.arrived:
                self._done += 1

    def _why(self, place: int) -> str:
        return f"sum {place + 1} of {len(self._sequence)} of step()"

    def tell(self, outcome: Outcome) -> list[float]:
        """Take part in the all-reduces of this step that are still to come, without a step, and say why.

        Returns:
            How many ranks have said each ``Outcome``. Waits for the device.
        """
        self.finish()
        while not self.decided:
            for tensor in self._sequence[self._done]:
                tensor.zero_()
            for table in (self.table, self.masks):
                if table is not None:
                    table.outcome.zero_()
                    table.outcome[outcome] = 1.0
            self.reduce()
        told: list[float] = self.last.outcome.tolist()
        return told
