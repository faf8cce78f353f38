"""Learning rates as people and schedulers set them, and what is worth saying of them, each once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from ppsf_dist.methods.base import Group, Method


def readable(lr: float | Tensor) -> float | None:
    """A learning rate that can be read without waiting for a device."""
    return None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


class LearningRates:
    """Follows the learning rates of an optimizer's groups from step to step. Tensors are read at the first one alone.

    Args:
        method: which says what each means to it.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._constructed: set[float | None] = set()
        self._before: list[float | None] | None = None
        self._said: set[str] = set()

    def constructed_with(self, groups: Sequence[Group]) -> None:
        """Know what the constructor has had its say about."""
        self._constructed |= {readable(group["lr"]) for group in groups}

    def restart(self) -> None:
        """The next step follows none: somebody has loaded a checkpoint, for instance."""
        self._before = None

    def see(self, groups: Sequence[Group]) -> None:
        """Look at the learning rates of a step that begins, and warn."""
        now = [None if isinstance(lr := group["lr"], Tensor) else float(lr) for group in groups]
        if now == self._before:
            return
        before, self._before = self._before, now
        if before is None or len(before) != len(now):
            for lr in {readable(group["lr"]) for group in groups} - self._constructed:
                self._say("first", None if lr is None else self._method.doubt_about_lr(lr))
            return
        for group, old, new in zip(groups, before, now, strict=True):
            if old is not None and new is not None:
                self._say("schedule", self._method.doubt_about_schedule(group, old, new))

    def _say(self, what: str, message: str | None) -> None:
        if message is not None and what not in self._said:
            self._said.add(what)
            warnings.warn(message, UserWarning, stacklevel=2)
