"""The table that a thorough run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.thorough.tally import BEGIN, END, Tally, table, write


def test_a_table_says_what_was_lost_and_what_broke_off(tmp_path: Path) -> None:
    well, badly, half = Tally("well", tried=1_000, seconds=90), Tally("badly", tried=3, lost=["seed 2"]), Tally("half")
    well.count("kills", 7)
    well.conclude()
    with pytest.raises(AssertionError, match="1 of 3 lost: badly\nseed 2"):
        badly.conclude()
    assert table([well, badly, half]).splitlines()[2:] == [
        "| well (7 kills) | 1,000 | 1,000 | 0 | 1.5 |",
        "| badly | 3 | 2 | 1 | 0.0 |",
        "| half | 0 | 0 | 0, broke off | 0.0 |",
    ]
    page = tmp_path / "page.md"
    for _ in range(2):
        page.write_text(page.read_text() if page.exists() else f"before\n{BEGIN}\nold\n{END}\nafter\n")
        write(page, [well], "./launch/test.sh --thorough", 120)
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}\n`./launch/test.sh --thorough`, ") and text.endswith(
            f"\n{END}\nafter\n"
        )
        assert ", 2 minutes, " in text and text.count("| well ") == 1 and "old" not in text


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(pytest.UsageError, match="expected a file with a line"):
        write(page, [], "", 0)
