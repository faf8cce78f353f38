"""Settings of the whole test session: its options, and what is left to ``--thorough``."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import hypothesis
import pytest
import pytest_timeout  # type: ignore[import-untyped]

from tests.harness.patience import Patience, family, watched
from tests.rotation import left_out, may_be_quick, quick

# Before torch is imported: with more threads the order of summation would depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples in every run.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")
# A test may work for so many times as long as it may do nothing.
WORK_PER_IDLENESS = 4
TESTS = Path(__file__).parent
ONE_AFTER_THE_OTHER = ("launch", "bootstrap")
"""Folders whose files are not divided."""
FEW = 20
"""Tests that are asked for one by one; nothing of them is left out."""

_WATCH = pytest.StashKey[ExitStack]()


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """``timeout`` counts seconds in which neither the test nor a process that it started works, on no clock."""

    def fail(number: int, frame: FrameType | None) -> None:
        pytest_timeout.timeout_sigalrm(item, settings)

    def patience() -> Patience:
        return Patience(settings.timeout, lambda: family(os.getpid()), work=WORK_PER_IDLENESS * settings.timeout)

    item.stash[_WATCH] = ExitStack()
    item.stash[_WATCH].callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, fail))
    item.stash[_WATCH].enter_context(watched(patience, lambda: os.kill(os.getpid(), signal.SIGALRM)))
    return True


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    """Called more than once, and for what was never watched."""
    item.stash.get(_WATCH, ExitStack()).close()
    return True


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ppsf_dist")
    group.addoption(
        "--thorough",
        action="store_true",
        help="run what the quick default leaves out, and nothing else: every switch on every layout, and the campaigns "
        "of tests/thorough in full",
    )
    group.addoption("--quick", action="store_true", help="run for a minute what is worth running after every edit")
    group.addoption(
        "--cases-scale",
        type=float,
        default=1.0,
        metavar="PART",
        help="with --thorough: this part of the cases of each campaign (default: 1.0)",
    )
    group.addoption(
        "--figures", type=Path, metavar="FILE", help="with --thorough: put the table of the campaigns into this page"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("--quick") or not collection_path.name.startswith("test_"):
        return None
    return None if may_be_quick(collection_path.relative_to(TESTS).as_posix()) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The default runs what is neither marked ``thorough`` nor left out by ``tests/rotation.py``; ``campaign`` runs in
    it as a slice, and whole with ``--thorough``, which runs the rest. ``--quick`` is a choice of the default."""
    thorough = bool(config.getoption("--thorough"))
    if thorough and config.getoption("--quick"):
        raise pytest.UsageError("--quick runs a part of the default, --thorough what it leaves out: choose one")
    # A test that was asked for by its name runs.
    names = [item.nodeid for item in items]
    out = left_out(names) if len(items) > FEW else set()
    fast = quick(names) if config.getoption("--quick") else set(names)
    kept: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        is_late = bool(item.get_closest_marker("thorough")) or item.nodeid in out
        if item.get_closest_marker("campaign"):
            kept[thorough or item.nodeid in fast].append(item)
        else:
            kept[is_late == thorough and item.nodeid in fast].append(item)
        if item.path.relative_to(TESTS).parts[0] in ONE_AFTER_THE_OTHER:
            # With pytest -n: they share runs that take long, or look for free ports.
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    config.hook.pytest_deselected(items=kept[False])
    items[:] = kept[True]


@pytest.fixture(scope="session", autouse=True)
def _close_worker_pool() -> Iterator[None]:
    yield
    from tests.harness import pool

    pool.close()
