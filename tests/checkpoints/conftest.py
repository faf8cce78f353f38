"""Each test is a job of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ppsf_dist.fsdp import release_checkpoint


@pytest.fixture(autouse=True)
def _a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test cuts the power, so nothing needs to reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    release_checkpoint()
