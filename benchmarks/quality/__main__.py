"""What it costs in quality to tune nothing: ``python -m benchmarks.quality``.

Trains every rival on every workload, over the grid of learning rates where it has one, with several seeds, each run in
one thread. A run that the folder has already is not run again, so this can be stopped and started at any time. Then
prints the tables of docs/quality.md and draws its pictures.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality import pictures, tables
from benchmarks.quality.campaign import SEEDS, Campaign
from benchmarks.quality.rivals import RIVALS
from benchmarks.quality.tables import Results
from benchmarks.quality.training import Run
from benchmarks.quality.workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME",
                        help=f"of {', '.join(WORKLOADS)} (default: all)")  # fmt: skip
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="NAME",
                        help=f"of {', '.join(RIVALS)} (default: all)")  # fmt: skip
    parser.add_argument(
        "--seeds",
        type=int,
        default=len(SEEDS),
        choices=range(1, len(SEEDS) + 1),
        metavar="N",
        help=f"of each, from {SEEDS[0]} on (default: {len(SEEDS)})",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--multiplied", action="store_true",
                        help="also with the step size of the recommended setting halved and doubled")  # fmt: skip
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quality"),
        help="of the runs, or with --show a file of --records (default: runs/quality)",
    )
    parser.add_argument("--pictures", type=Path, help="folder for the pictures (default: none are drawn)")
    parser.add_argument("--page", type=Path, help="Markdown page to put the tables into, where it names them")
    parser.add_argument("--records", type=Path, help="file to gather all records in")
    parser.add_argument("--show", action="store_true", help="run nothing: show what the folder has")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: must be at least 1")
    warnings.simplefilter("ignore")
    campaign = Campaign(arguments.folder)
    if arguments.folder.is_file() and not arguments.show:
        parser.error(f"--folder {arguments.folder} is a file of records, which can only be shown: add --show")
    if not arguments.show:
        with tqdm(unit="run", file=sys.stderr) as bar:

            def wanted() -> list[Run]:
                runs = list(
                    campaign.wanted(arguments.workloads, arguments.rivals, arguments.seeds, arguments.multiplied)
                )
                bar.total = bar.n + len(runs)
                return runs

            def told(run: Run) -> None:
                bar.set_postfix_str(run.name, refresh=False)
                bar.update()

            campaign.run(wanted, arguments.jobs, told)
    results = Results(campaign, arguments.seeds)
    if not results.workloads():
        sys.exit(
            f"{arguments.folder} has no workload with AdamW's whole grid over {arguments.seeds} seeds: run it first"
        )
    made = tables.everything(results)
    for title, table in made.items():
        print(f"\n{title}\n\n{table}")
    if arguments.records:
        campaign.gather(arguments.records)
    if arguments.page:
        arguments.page.write_text(tables.put(arguments.page.read_text(), made))
    if arguments.pictures:
        pictures.sensitivity(results, arguments.pictures / "sensitivity.png")
        pictures.losses(results, arguments.pictures / "losses.png")
        pictures.sizes(results, arguments.pictures / "sizes.png")


if __name__ == "__main__":
    main()
