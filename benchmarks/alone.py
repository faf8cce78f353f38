"""What ``step_param`` costs for one parameter alone, beside the reference's: ``python -m benchmarks.alone``.

Both step the same parameters in turn, one call after the other; medians over all calls.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
import warnings
from typing import Any

import torch
from torch import nn

from ppsf_dist import ProdigyPlusScheduleFree

SHAPES = ((64, 64), (256, 256), (768, 768))
COUNT = 20
WARM_UP = 2


def parameters(shape: tuple[int, int]) -> list[nn.Parameter]:
    """Some parameters of a shape, with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02)) for _ in range(COUNT)]
    for p in made:
        p.grad = torch.randn(shape, generator=generator).mul_(0.01)
    return made


def measure(optimizers: list[type[Any]], shape: tuple[int, int], steps: int) -> list[float]:
    """Median seconds of a call, for each optimizer."""
    pairs: list[tuple[Any, list[nn.Parameter]]] = []
    for of in optimizers:
        params = parameters(shape)
        with contextlib.redirect_stdout(io.StringIO()):
            pairs.append((of(params, fused_back_pass=True), params))
    taken: list[list[float]] = [[] for _ in pairs]
    for step in range(WARM_UP + steps):
        for seconds, (optimizer, params) in zip(taken, pairs, strict=True):
            for p in params:
                start = time.perf_counter()
                optimizer.step_param(p, optimizer.param_groups[0])
                if step >= WARM_UP:
                    seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alone", description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each (default: 10)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| parameter | ppsf_dist, us | prodigy-plus-schedule-free, us | ratio |\n|---|---|---|---|")
    for shape in SHAPES:
        ours, reference = measure([ProdigyPlusScheduleFree, Reference], shape, arguments.steps)
        print(f"| {shape[0]} x {shape[1]} | {ours * 1e6:,.0f} | {reference * 1e6:,.0f} | {ours / reference:.2f} |")


if __name__ == "__main__":
    main()
