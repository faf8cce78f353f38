"""Which kernels optimizers use that are built here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from ppsf_dist.engine.host import HostAccess
from ppsf_dist.kernels.choice import VARIABLE

Result = TypeVar("Result")


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """As if the environment variable ``PPSF_KERNELS`` said so."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def interpreted(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call something with Triton's kernels, on a rank of the pool: there Triton interprets."""
    with kernels("triton"):
        return function(*arguments)


def as_on_an_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Nothing may be read by the host in a step, although all of it is there."""
    patch.setattr(HostAccess, "free", property(lambda host: False, lambda host, free: None), raising=False)
