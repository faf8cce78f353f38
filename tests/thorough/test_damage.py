"""A damaged checkpoint loads as what was saved, or not at all."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.harness.layouts import LAYOUTS
from tests.harness.pool import JobFailed, run
from tests.thorough.conftest import Amount
from tests.thorough.damage import NEW, OLD, OTHER, Damage, damages, files, load_damaged, make_checkpoints
from tests.thorough.tally import Tally

MINUTES = 30
BATCH = 100
FLIPS = 60
"""Of each file."""

HANG_SECONDS = 120.0


@pytest.mark.dist
@pytest.mark.campaign
@pytest.mark.timeout(MINUTES * 60)
def test_damage(amount: Amount, tally: Tally, tmp_path: Path) -> None:
    """Bit flips, truncations and swaps of every file of a checkpoint: loaded as saved, or refused with nothing changed.

    On one rank and on two, which may both have to refuse what only one of them reads.
    """
    for layout in ("single", "fsdp_2"):
        folder = tmp_path / layout
        folder.mkdir()
        run(LAYOUTS[layout].world_size, make_checkpoints, layout, folder)
        others = {name: set(files(folder / name)) for name in (OLD, OTHER)}
        wanted = list(damages(files(folder / NEW), others, FLIPS, seed=0))
        wanted = random.Random(0).sample(wanted, amount(len(wanted), 6))
        for first in range(0, len(wanted), BATCH):
            attempt(layout, folder, wanted[first : first + BATCH], tally)
        tally.count(f"on {LAYOUTS[layout].world_size} ranks", len(wanted))
    tally.conclude()


def attempt(layout: str, folder: Path, wanted: list[Damage], tally: Tally) -> None:
    """Try all damages; go on with the next one where a world dies or hangs."""
    finished = folder / "finished"
    while wanted:
        finished.write_text("0")
        try:
            of_ranks = run(
                LAYOUTS[layout].world_size, load_damaged, layout, folder, wanted, finished, timeout=HANG_SECONDS
            )
        except JobFailed as failure:
            count = int(finished.read_text())
            tally.lost.append(f"{layout} {wanted[count]}: {failure}")
            count += 1
        else:
            count = len(wanted)
            for damage in wanted:
                problems = {problem for problems in of_ranks if (problem := problems.get(damage))}
                if problems:
                    tally.lost.append(f"{layout} {damage}: {', '.join(sorted(problems))}")
        tally.tried += count
        wanted = wanted[count:]
        for left in folder.glob("damaged*"):
            shutil.rmtree(left)
