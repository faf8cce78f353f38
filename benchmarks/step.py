"""What a step costs beside torch's fused AdamW: ``python -m benchmarks.step --set gpt2 --dtype bf16``.

Each optimizer and fused AdamW step parameters of the same shapes in turn; what is printed are medians, and the ratios
pair by pair. On a CPU with one thread the time is that of the process, which others do not disturb.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.measuring import Cost, compare, copy_bandwidth
from benchmarks.optimizers import BASELINE, OPTIMIZERS, build
from benchmarks.sets import SETS, elements, parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(name: str, dtype: str, device: str, optimizers: list[str], steps: int) -> list[Cost]:
    """The cost of each optimizer on a set; one that cannot be built is left out and named."""
    costs: list[Cost] = []
    baseline = build(BASELINE, parameters(name, DTYPES[dtype], device))
    others = [one for one in optimizers if one != BASELINE]
    with tqdm(total=len(others) * steps, desc=f"{name} {dtype}", leave=False, disable=not sys.stderr.isatty()) as bar:
        for one in others:
            try:
                optimizer = build(one, parameters(name, DTYPES[dtype], device))
            except Exception as error:
                print(f"{one} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
                bar.update(steps)
                continue
            costs.append(compare(one, optimizer, baseline, device, steps, told=bar.update))
            del optimizer
            gc.collect()
    own = compare(BASELINE, build(BASELINE, parameters(name, DTYPES[dtype], device)), baseline, device, steps)
    return [own, *costs]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", nargs="+", default=["gpt2"], choices=list(SETS), help="parameters (default: gpt2)")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=list(DTYPES), help="of them (default: fp32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS), metavar="NAME",
                        help=f"of {', '.join(OPTIMIZERS)} (default: all)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--json", type=Path, help="folder for a file of each table")
    parser.add_argument("--chart", type=Path, help="folder for a picture of each table")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(", ".join(f"{key} {value}" for key, value in report.machine().items() if value is not None))
    for folder in (arguments.json, arguments.chart):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.set:
        for dtype in arguments.dtype:
            costs = measure(name, dtype, arguments.device, arguments.optimizers, arguments.steps)
            title = f"{name}, {dtype}, {arguments.device}: {len(SETS[name])} tensors, {elements(name):,} elements"
            print(f"\n{title}\n\n{report.table(costs, elements(name))}", flush=True)
            if arguments.device == "cuda":
                print(f"\nA copy reads and writes {copy_bandwidth() / 1e9:,.0f} GB in a second.", flush=True)
            stem = f"step_{name}_{dtype}_{arguments.device}"
            if arguments.json is not None:
                what = {"set": name, "dtype": dtype, "device": arguments.device, "steps": arguments.steps}
                report.write_json(arguments.json / f"{stem}.json", costs, elements(name), **what)
            if arguments.chart is not None:
                report.write_chart(arguments.chart / f"{stem}.png", costs, title)


if __name__ == "__main__":
    main()
