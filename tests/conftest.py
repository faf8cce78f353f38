"""Settings of the whole test session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch is imported: with more threads the order of summation would depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _close_worker_pool() -> Iterator[None]:
    yield
    from tests.harness import pool

    pool.close()
