"""Which kernels optimizers use that are built here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ppsf_dist.kernels.choice import VARIABLE


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
