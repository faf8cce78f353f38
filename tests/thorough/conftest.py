"""How many cases a campaign runs, and the table at the end of a run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.thorough.tally import Tally, marks_of, table, write

TALLIES = pytest.StashKey[list[Tally]]()
STARTED = pytest.StashKey[float]()

Amount = Callable[[int, int], int]
"""``amount(thorough, quick)``: how many cases to run, from the numbers for both kinds of runs."""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--thorough") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--thorough counts what its campaigns do in one process: leave -n out")
    page: Path | None = config.getoption("--figures")
    if page is not None:
        marks_of(page)  # Before hours of work, not after them.
    config.stash[TALLIES] = []
    config.stash[STARTED] = time.monotonic()


@pytest.fixture
def amount(pytestconfig: pytest.Config) -> Amount:
    def of(thorough: int, quick: int) -> int:
        if not pytestconfig.getoption("--thorough"):
            return quick
        return max(1, round(thorough * float(pytestconfig.getoption("--cases-scale"))))

    return of


@pytest.fixture
def tally(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[Tally]:
    """The figures of this campaign, under the first line of its docstring."""
    title = (request.function.__doc__ or request.node.name).splitlines()[0].rstrip(".")
    ours = Tally(title)
    pytestconfig.stash[TALLIES].append(ours)
    begun = time.monotonic()
    yield ours
    ours.seconds = time.monotonic() - begun


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tallies = config.stash[TALLIES]
    if not config.getoption("--thorough") or not tallies:
        return
    terminalreporter.section("campaigns")
    terminalreporter.write_line(table(tallies))
    page: Path | None = config.getoption("--figures")
    if page is not None:
        command = shlex.join(["./launch/test.sh", *config.invocation_params.args])
        write(page, tallies, command, time.monotonic() - config.stash[STARTED])
