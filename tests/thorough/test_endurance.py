"""Nothing grows, and nothing drifts apart, in a long run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ppsf_dist.checkpoints.lock import MOST
from tests.harness.pool import run
from tests.runs import difference
from tests.thorough.conftest import Amount
from tests.thorough.endurance import many_steps, same_steps_alone
from tests.thorough.tally import Tally

MINUTES = 30
LAYOUT = "fsdp_2"
STRETCH = 100
"""Steps between two checkpoints; a few of them in the quick run."""

ALLOWED = {"d": 1e-6, "weights": 1e-5}
"""As on the layouts of ``tests/test_layouts.py``, over each stretch. One process whose gradients are moved by a
rounding unit is 5.9e-6 off in d after 20,000 steps, and 7.3e-5 with ``reference_quirks=False``: so each stretch starts
anew from the weights and state of the ranks."""

WARM_UP = 2_000
"""Steps after which allocators and caches have what they need. A shorter run says nothing about memory."""

PAGES = 64 * 4096
"""What an allocator may take and give back in all. One object of 64 bytes a step would be 1.2 MB."""


@pytest.mark.dist
@pytest.mark.campaign
@pytest.mark.timeout(MINUTES * 60)
def test_steps(amount: Amount, tally: Tally, tmp_path: Path) -> None:
    """Steps of one run on two ranks: nothing grows, d is the same bit for bit, and that of one process."""
    stretches, steps = amount(20_000 // STRETCH, 12), amount(STRETCH, 4)
    ranks = run(2, many_steps, LAYOUT, stretches, steps, tmp_path, timeout=MINUTES * 60)
    (alone,) = run(1, same_steps_alone, stretches, steps, tmp_path, timeout=MINUTES * 60)
    tally.tried = stretches * steps
    for number, (first, second, expected) in enumerate(zip(*ranks, alone, strict=True)):
        where = f"steps {number * steps} to {(number + 1) * steps}"
        if first.run.groups != second.run.groups:
            tally.lost.append(f"{where}: ranks disagree about the numbers of a group")
        apart = difference(first.run, expected)
        if not all(value <= ALLOWED[name] for name, value in apart.items()):
            tally.lost.append(f"{where}: apart from one process by {apart}")
        if not all(math.isfinite(d) for ds in first.run.numbers("d") for d in ds):
            tally.lost.append(f"{where}: d is not finite")
        if not all(bool(torch.isfinite(weight).all()) for weight in first.run.weights.values()):
            tally.lost.append(f"{where}: weights are not finite")
        if first.run.groups[-1][0]["k"] != (number + 1) * steps + 1:
            tally.lost.append(f"{where}: k is {first.run.groups[-1][0]['k']}")
    for rank, readings in enumerate(ranks):
        # Each checkpoint has a folder of its own, of which so many stay locked.
        settled = readings[MOST:]
        for name in ("process_groups", "handles", "threads"):
            values = [getattr(reading, name) for reading in settled]
            if len(set(values)) > 1:
                tally.lost.append(f"{name} of rank {rank}: {values}")
        grown = [reading.grown for reading in readings[-(-WARM_UP // steps) :]]
        if sum(grown) > PAGES:
            tally.lost.append(f"memory of rank {rank} grew: {grown}")
    tally.conclude()
