"""Ctrl-C and SIGTERM as a wish that the training loop grants at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal and a launcher may both pass on the same ctrl-C; a later one comes from a person who will not wait.
REPEAT_SECONDS = 2.0


class StopRequest:
    """Inside `with`, remembers SIGINT and SIGTERM instead of dying of them.

    A second signal, `REPEAT_SECONDS` after the first or later, does what it would do without this class.
    """

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def counts(self) -> list[float]:
        """Returns for each of `SIGNALS` 1.0 when it was received, else 0.0: numbers that ranks can add up."""
        return [float(self._received == number) for number in SIGNALS]

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = number, now
        elif now - self._received_at >= REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def first_received(counts: list[float]) -> int:
    """Returns the number of the signal that any rank received, given the sum of `StopRequest.counts`, or 0."""
    return next((int(number) for number, count in zip(SIGNALS, counts, strict=True) if count > 0), 0)
