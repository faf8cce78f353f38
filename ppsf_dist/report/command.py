"""The command ``ppsf-dist``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ppsf_dist.extras import missing
from ppsf_dist.release import RELEASE
from ppsf_dist.report.page import page
from ppsf_dist.report.runs import differing, read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 2 with a line on standard error where something cannot be read."""
    parser = argparse.ArgumentParser(prog="ppsf-dist", description="Tools for runs of ppsf_dist.")
    parser.add_argument("--version", action="version", version=RELEASE)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report",
        help="compare runs",
        description="Compares runs: loss, d, tokens/s and settings that differ, as a table here, a picture and a page.",
    )
    report.add_argument("runs", nargs="+", type=Path, help=".jsonl files of a Monitor, or folders with one")
    report.add_argument("--output", type=Path, default=Path("report"), help="for report.png and report.html [report]")
    given = parser.parse_args(arguments)
    try:
        write_report(given.runs, given.output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.stderr.write(f"ppsf-dist: {error}\n")
        return 2
    return 0


def write_report(paths: Sequence[Path], output: Path) -> None:
    """Print the table of some runs, and write their picture and page into a folder.

    Raises:
        FileNotFoundError, ValueError: as ``ppsf_dist.report.runs.read_runs``; nothing is written.
        ModuleNotFoundError: the ``report`` extra is not there.
    """
    try:
        from rich.console import Console
        from rich.table import Column, Table

        from ppsf_dist.report.picture import draw
    except ModuleNotFoundError as error:
        raise missing(error, "report", ("rich", "matplotlib")) from error

    runs = read_runs(paths)
    summaries = {run.name: run.summary() for run in runs}
    headings = [name for name in runs[0].summary() if any(summary[name] for summary in summaries.values())]
    settings = differing(runs)
    console = Console()
    table = Table("", *(Column(name, overflow="fold", justify="right") for name in summaries))
    for heading in headings:
        table.add_row(heading, *(summary[heading] for summary in summaries.values()))
    table.add_section()
    for name, values in settings.items():
        table.add_row(name, *values)
    console.print(table)
    picture = draw(runs)
    rows = {name: [summary[heading] for heading in headings] for name, summary in summaries.items()}
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.png").write_bytes(picture)
    (output / "report.html").write_text(page(" and ".join(summaries), headings, rows, settings, picture))
    console.print(f"{output / 'report.png'}, {output / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
