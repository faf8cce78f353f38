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

# A process that uses less than this share of a processor waits. The threads of gloo and launchers that look after their
# ranks use half a hundredth; one that works gets more beside a hundred busy programs.
IDLE_SHARE = 0.02
# The kernel counts in hundredths of a second: over less than this the share of one who waits may seem large.
LOOK_SECONDS = 2.0
LOOKS = 4
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

    It is at an end when all of them have done nothing for ``seconds`` in all, or the busiest has worked for ``work``.

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
        self.look_after = min(LOOK_SECONDS, seconds / LOOKS)
        self._processes, self._clock, self._used = processes, clock, used
        self._idle_left = seconds
        self._work_left = seconds if work is None else work
        self._looked_at = clock()
        self._before = self._now()

    def left(self) -> float:
        """The seconds that are left, not above 0 at the end. Looks at the processes when it is time to look again."""
        passed = self._clock() - self._looked_at
        if passed >= self.look_after:
            before, self._before = self._before, self._now()
            self._looked_at += passed
            worked = max((used - before.get(pid, 0.0) for pid, used in self._before.items()), default=0.0)
            if worked > IDLE_SHARE * passed:
                self._work_left -= worked
            else:
                self._idle_left -= passed
        return min(self._idle_left, self._work_left)

    def wait(self, connections: Iterable[Connection | int]) -> list[Any]:
        """Those of the connections or descriptors on which something has come in; none at the end of the patience."""
        waiting = list(connections)
        while True:
            ready = wait(waiting, self.look_after if self.left() > 0 else 0.0)
            if ready or self.left() <= 0:
                return ready

    def _now(self) -> dict[int, float]:
        return {pid: self._used(pid) for pid in self._processes()}


@contextmanager
def watched(patience: Callable[[], Patience], at_the_end: Callable[[], None]) -> Iterator[None]:
    """While open, a thread calls ``at_the_end`` once the patience is at an end."""
    over = threading.Event()

    def watch() -> None:
        # Most tests are over before there is anything to look at.
        if over.wait(1.0):
            return
        watching = patience()
        while not over.wait(watching.look_after):
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
