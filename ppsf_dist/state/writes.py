"""Writes that an exception may interrupt but never tears: what has been decided can be brought to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Write(NamedTuple):
    """Values for some tensors, computed beside them.

    Attributes:
        targets: tensors of equal shape.
        values: one for each, in any floating dtype.
        gate: of a single target: a bool on the device, False keeps what it holds.
    """

    targets: Sequence[Tensor]
    values: Sequence[Tensor]
    gate: Tensor | None = None

    def apply(self) -> None:
        """Write. Doing it twice is doing it once, because no value is computed from a target."""
        if self.gate is None:
            torch._foreach_copy_(list(self.targets), list(self.values))
        else:
            (target,), (value,) = self.targets, self.values
            torch.where(self.gate, value.to(target.dtype), target, out=target)


class Writes:
    """A sequence of writes in which each may read what the ones before it have written.

    Go over the whole sequence, ``put`` after ``put``. Where an exception (a ctrl-C too) has ended that, call
    ``restart`` and go over the same sequence again: what was written is left alone, what was computed but perhaps
    not written is written, and the rest follows. So an exception is no more than a pause.
    """

    def __init__(self) -> None:
        self._position = 0
        # One attribute, so that no exception can come between its two halves.
        self._progress: tuple[int, list[Write] | None] = (0, None)

    def restart(self) -> None:
        """Begin to go over the sequence again."""
        self._position = 0

    def put(self, compute: Callable[[], Iterable[Write]]) -> None:
        """The next write of the sequence; ``compute`` changes nothing that any of the sequence reads."""
        index, self._position = self._position, self._position + 1
        done, computed = self._progress
        if index < done:
            return
        if computed is None:
            computed = list(compute())
            self._progress = (index, computed)
        for write in computed:
            write.apply()
        self._progress = (index + 1, None)
