"""Which part of a product of tests runs by default, and which is left to ``--thorough``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest


def rotated(first: Collection[Any], second: Collection[Any], rounds: int = 2) -> list[Any]:
    """All pairs, for ``parametrize``: by default each value meets at least ``rounds`` of the others.

    In round 0 both lists are walked in step, the shorter one over and over. In each later round the first list is one
    further ahead, and one more each time that it has been walked through, so that no two values always come together.
    The other pairs are marked ``thorough``.
    """
    ones, others = list(first), list(second)
    chosen = {
        ((index + round_ * (1 + index // len(ones))) % len(ones), index % len(others))
        for round_ in range(rounds)
        for index in range(max(len(ones), len(others)))
    }
    return [
        pytest.param(one, other, marks=() if (i, j) in chosen else pytest.mark.thorough)
        for i, one in enumerate(ones)
        for j, other in enumerate(others)
    ]
