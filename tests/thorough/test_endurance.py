"""Nothing grows, and nothing drifts apart, in a long run."""

from __future__ import annotations

import math

import pytest
import torch

from tests.harness.pool import run
from tests.runs import difference
from tests.thorough.conftest import Amount
from tests.thorough.endurance import READINGS, many_steps
from tests.thorough.tally import Tally

MINUTES = 30
LAYOUT = "fsdp_2"
ALLOWED = {"d": 1e-6, "weights": 1e-5}
WARM_UP = 2_000
"""Steps after which allocators and caches have what they need."""

PAGES = 64 * 4096
"""What an allocator may take and give back between two readings. One object of 64 bytes a step would be 1.2 MB."""


@pytest.mark.dist
@pytest.mark.campaign
@pytest.mark.timeout(MINUTES * 60)
def test_steps(amount: Amount, tally: Tally) -> None:
    """Steps of one run on two ranks: nothing grows, d is the same bit for bit, and that of one process."""
    steps = amount(20_000, 40)
    ranks = run(2, many_steps, LAYOUT, steps, timeout=MINUTES * 60)
    (alone,) = run(1, many_steps, "single", steps, timeout=MINUTES * 60)
    tally.tried = steps
    first, second = ranks
    if first.run.groups != second.run.groups:
        tally.lost.append("ranks disagree about the numbers of a group")
    apart = difference(first.run, alone.run)
    if any(value > ALLOWED[name] for name, value in apart.items()):
        tally.lost.append(f"apart from one process by {apart}")
    if not all(math.isfinite(d) for ds in first.run.numbers("d") for d in ds):
        tally.lost.append("d is not finite")
    if not all(bool(torch.isfinite(weight).all()) for weight in first.run.weights.values()):
        tally.lost.append("weights are not finite")
    if first.run.groups[-1][0]["k"] != steps + 1:
        tally.lost.append(f"k is {first.run.groups[-1][0]['k']} after {steps} steps")
    for rank, long in enumerate(ranks):
        for name in ("process_groups", "handles", "threads"):
            values = getattr(long, name)
            if len(set(values)) > 1:
                tally.lost.append(f"{name} of rank {rank}: {values}")
        settled = long.memory[-(-WARM_UP * READINGS // steps) :]
        if settled and settled[-1] - settled[0] > PAGES:
            tally.lost.append(f"memory of rank {rank} grew: {long.memory}")
    tally.conclude()
