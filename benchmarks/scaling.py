"""How much of a step is spent in reductions, as parameters and ranks grow: ``python -m benchmarks.scaling``.

Ranks are processes of this machine that talk through gloo, each with a slice of every matrix (FSDP2's ``Shard(0)``);
the slowest of them counts. With more ranks than cores they wait for each other's turn as well.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.ranks import Point, measure
from ppsf_dist.engine.reductions import MOST_PORTIONS, OF_A_PORTION
from tests.harness.pool import run


def table(rows: list[tuple[int, int, Point]]) -> str:
    """In Markdown."""
    lines = [
        "| ranks | matrices | step, ms | in reductions, ms | share | all-reduces | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks, matrices, point in rows:
        lines.append(
            f"| {ranks} | {matrices} | {point.step * 1e3:.2f} | {point.reductions * 1e3:.2f} "
            f"| {point.reductions / point.step:.0%} | {point.collectives} | {point.collective_bytes:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--matrices", nargs="+", type=int, default=[10, 100, 1000], help="(default: 10 100 1000)")
    parser.add_argument("--size", type=int, default=256, help="rows and columns of each (default: 256)")
    parser.add_argument("--steps", type=int, default=15, help="measured steps (default: 15)")
    parser.add_argument("--portions", type=int, default=MOST_PORTIONS,
                        help="most portions in which sums of g^2 travel (default: %(default)s)")  # fmt: skip
    parser.add_argument("--worth", type=int, default=OF_A_PORTION,
                        help="sums that are worth a portion of their own (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args()
    rows: list[tuple[int, int, Point]] = []
    for ranks in arguments.ranks:
        for matrices in arguments.matrices:
            points: list[Any] = run(
                ranks, measure, matrices, arguments.size, arguments.steps, arguments.portions, arguments.worth
            )
            rows.append((ranks, matrices, max(points, key=lambda point: float(point.step))))
    print(table(rows))


if __name__ == "__main__":
    main()
