"""Time limits that a busy machine does not reach.

What hangs is told from what is slow by the work that it does, not by a clock: processes that wait for each other use no
processor, and processes that others have crowded out still use a little of one. Linux only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Processes that use less than this share of one processor, all together, wait. Launchers that look after their ranks
# every moment use a hundredth; on a machine with a hundred busy programs one that works still gets more.
IDLE_SHARE = 0.02
LOOK_SECONDS = 0.25
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """The processor time that a process has used; 0 if it is gone."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
    return 0.0


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    children: list[str] = []
    for task in _entries(f"/proc/{pid}/task"):
        with suppress(OSError):
            children += (task / "children").read_text().split()
    for child in children:
        yield from family(int(child))


def _entries(folder: str) -> list[Path]:
    with suppress(OSError):
        return list(Path(folder).iterdir())
    return []


class Patience:
    """How long some processes may still take.

    It is at an end when none of them has worked for ``seconds`` on end, or when the busiest has worked for ``work``.

    Args:
        seconds: how long they may do nothing.
        processes: tells which processes those are now.
        work: how much processor time they may use (default: ``seconds``).
        clock, used: for tests.
    """

    def __init__(
        self,
        seconds: float,
        processes: Callable[[], Iterable[int]],
        *,
        work: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[int], float] = processor_seconds,
    ) -> None:
        self._processes, self._clock, self._used = processes, clock, used
        self._seconds = seconds
        self._work_left = seconds if work is None else work
        self._idle_left = seconds
        self._looked_at = clock()
        self._before = self._now()

    def left(self) -> float:
        """Looks at the processes and returns the seconds that they have left; not above 0 when it is at an end."""
        now, before = self._clock(), self._before
        passed, self._looked_at = now - self._looked_at, now
        self._before = self._now()
        worked = [max(0.0, used - before.get(pid, 0.0)) for pid, used in self._before.items()]
        self._work_left -= max(worked, default=0.0)
        self._idle_left = self._idle_left - passed if sum(worked) <= IDLE_SHARE * passed else self._seconds
        return min(self._idle_left, self._work_left)

    def wait(self, connections: Iterable[Connection | int]) -> list[Any]:
        """Those of the connections or descriptors on which something has come in; none at the end of the patience."""
        waiting = list(connections)
        left = self.left()
        while True:
            ready = wait(waiting, max(0.0, min(left, LOOK_SECONDS)))
            if ready or left <= 0:
                return ready
            left = self.left()

    def _now(self) -> dict[int, float]:
        return {pid: self._used(pid) for pid in self._processes()}


@contextmanager
def watched(patience: Callable[[], Patience], at_the_end: Callable[[], None]) -> Iterator[None]:
    """While open, a thread calls ``at_the_end`` once the patience is at an end."""
    over = threading.Event()

    def watch() -> None:
        # Most tests are over before there is anything to look at.
        if over.wait(LOOK_SECONDS):
            return
        watching = patience()
        while not over.wait(4 * LOOK_SECONDS):
            if watching.left() <= 0:
                at_the_end()
                return

    thread = threading.Thread(target=watch, name="tests-patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
