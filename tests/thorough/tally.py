"""What the campaigns of a run have tried and lost, and the table of it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
SHOWN = 20
"""Losses that a failing campaign describes."""


@dataclass
class Tally:
    """The figures of one campaign.

    Attributes:
        title: what was tried, as the table says it.
        tried: number of cases.
        lost: one description for each case that broke its promise, enough to run it again.
        seconds: how long the cases took.
        notes: further figures, such as how many processes were killed.
        finished: whether all cases were tried; one that hypothesis loses ends the campaign.
    """

    title: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)
    finished: bool = False

    def count(self, note: str, times: int = 1) -> None:
        self.notes[note] = self.notes.get(note, 0) + times

    def conclude(self) -> None:
        """Fail if anything was lost. Raises ``AssertionError`` with the first descriptions."""
        self.finished = True
        shown = "\n".join(self.lost[:SHOWN])
        assert not self.lost, f"{len(self.lost)} of {self.tried} lost: {self.title}\n{shown}"


def table(tallies: list[Tally]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| what | tried | survived | lost | minutes |", "|---|---|---|---|---|"]
    for tally in tallies:
        notes = ", ".join(f"{count:,} {note}" for note, count in tally.notes.items())
        what = f"{tally.title} ({notes})" if notes else tally.title
        lost = len(tally.lost)
        said = f"{lost:,}" if tally.finished else f"{lost:,}, broke off"
        lines.append(f"| {what} | {tally.tried:,} | {tally.tried - lost:,} | {said} | {tally.seconds / 60:.1f} |")
    return "\n".join(lines)


def machine() -> str:
    """Where the figures come from."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}"


def marks_of(page: Path) -> tuple[str, str]:
    """The text of a page before and after the place of the table.

    Raises:
        pytest.UsageError: there is no such page, or it has no such place.
    """
    text = page.read_text() if page.is_file() else ""
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise pytest.UsageError(
            f"--figures {page}: expected a file with a line {BEGIN} and a line {END} below it, for the table"
        )
    before, rest = text.split(BEGIN, 1)
    return before, rest.split(END, 1)[1]


def write(page: Path, tallies: list[Tally], command: str, seconds: float) -> None:
    """Put the table between the two marks of a page, with the command that made it."""
    before, after = marks_of(page)
    day = datetime.now(UTC).date().isoformat()
    said = f"`{command}`, {day}, {seconds / 60:.0f} minutes, {machine()}:"
    page.write_text(f"{before}{BEGIN}\n{said}\n\n{table(tallies)}\n{END}{after}")
