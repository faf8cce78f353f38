"""Who waits for ever is found, however busy the machine; who works is not disturbed, however slowly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tests.harness.patience import Patience, family, processor_seconds, watched


class Machine:
    """A clock and processes, which move when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.used = {1: 5.0, 2: 7.0}

    def patience(self, seconds: float, work: float | None = None) -> Patience:
        return Patience(
            seconds, lambda: list(self.used), work=work, clock=lambda: self.now, used=lambda pid: self.used[pid]
        )

    def pass_by(self, seconds: float, **work: float) -> None:
        self.now += seconds
        for name, used in work.items():
            pid = int(name.removeprefix("by_"))
            self.used[pid] = self.used.get(pid, 0.0) + used


def test_idle_processes_have_the_time_of_the_clock() -> None:
    machine = Machine()
    patience = machine.patience(60)
    for left in (40, 20, 0):
        machine.pass_by(20)
        assert patience.left() == left


@pytest.mark.parametrize("share", [0.03, 0.2, 1.0])
def test_processes_that_work_have_the_time_that_they_work(share: float) -> None:
    """However little of a processor the other programs leave them."""
    machine = Machine()
    patience = machine.patience(60, work=100)
    for _ in range(16):
        machine.pass_by(3 / share, by_1=3.0, by_2=2.0)
        assert patience.left() > 0
        machine.pass_by(3 / share, by_2=3.0)
        assert patience.left() > 0
    machine.pass_by(5 / share, by_2=5.0)
    assert patience.left() <= 0


def test_who_waits_is_found_although_its_threads_wake_up_now_and_then() -> None:
    machine = Machine()
    machine.used = dict.fromkeys(range(30), 0.0)
    patience = machine.patience(60)
    for second in range(1, 300):
        machine.pass_by(0.5)
        if second % 4 == 0:
            machine.used = {pid: used + 0.01 for pid, used in machine.used.items()}
        if patience.left() <= 0:
            break
    assert 60 <= machine.now < 66


def test_a_short_patience_ends_although_the_kernel_counts_in_hundredths() -> None:
    machine = Machine()
    patience = machine.patience(1)
    while patience.left() > 0:
        machine.pass_by(0.25)
        machine.pass_by(0.25, by_1=0.01)
    assert machine.now <= 2.5


def test_processes_come_and_go() -> None:
    machine = Machine()
    patience = machine.patience(60)
    machine.pass_by(2, by_3=0.5)
    assert patience.left() == 59.5
    del machine.used[1], machine.used[2], machine.used[3]
    machine.pass_by(10)
    assert patience.left() == 50


def test_a_family_is_all_that_descends() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert [pid for pid in family(os.getpid()) if pid == process.pid] and len(list(family(process.pid))) == 2
        assert processor_seconds(process.pid) > 0
        process.stdin.close()
    assert list(family(process.pid)) == [process.pid] and processor_seconds(process.pid) == 0


def test_a_watch_ends_with_what_it_watches_or_with_the_patience() -> None:
    ended = threading.Event()
    with watched(lambda: Machine().patience(0), ended.set):
        assert ended.wait(60)
    ended.clear()
    with watched(lambda: Machine().patience(1), ended.set):
        pass
    assert not ended.is_set()
