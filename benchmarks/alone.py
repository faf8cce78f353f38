"""What ``step_param`` costs for one parameter, beside the reference's: ``python -m benchmarks.alone``.

Both step the same parameters in turn: one call after the other, and in the hooks of a backward pass, of which the whole
time is counted. Medians over all calls and passes.
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
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree

SHAPES = ((64, 64), (256, 256), (768, 768))
COUNT = 20
WARM_UP = 2
Pair = tuple[Any, list[nn.Parameter]]


def pairs_of(optimizers: list[type[Any]], shape: tuple[int, int]) -> list[Pair]:
    """An optimizer of each class, with some parameters of a shape, which have the same gradients everywhere."""
    pairs: list[Pair] = []
    for of in optimizers:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02)) for _ in range(COUNT)]
        for p in params:
            p.grad = torch.randn(shape, generator=generator).mul_(0.01)
        with contextlib.redirect_stdout(io.StringIO()):
            pairs.append((of(params, fused_back_pass=True), params))
    return pairs


def one_by_one(optimizers: list[type[Any]], shape: tuple[int, int], steps: int) -> list[float]:
    """Median seconds of a call, for each optimizer."""
    pairs = pairs_of(optimizers, shape)
    taken: list[list[float]] = [[] for _ in pairs]
    for step in range(WARM_UP + steps):
        for seconds, (optimizer, params) in zip(taken, pairs, strict=True):
            for p in params:
                start = time.perf_counter()
                optimizer.step_param(p, optimizer.param_groups[0])
                if step >= WARM_UP:
                    seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def in_backward(optimizers: list[type[Any]], shape: tuple[int, int], steps: int) -> list[float]:
    """Median seconds of a backward pass that steps, for each parameter of each optimizer."""
    pairs = pairs_of(optimizers, shape)
    gradients = [[p.grad for p in params] for _, params in pairs]
    for optimizer, params in pairs:
        for p in params:
            p.grad = None
            p.register_post_accumulate_grad_hook(hook_of(optimizer))
    taken: list[list[float]] = [[] for _ in pairs]
    for step in range(WARM_UP + steps):
        for seconds, (optimizer, params), of_params in zip(taken, pairs, gradients, strict=True):
            loss = torch.stack([(p * g).sum() for p, g in zip(params, of_params, strict=True) if g is not None]).sum()
            start = time.perf_counter()
            loss.backward()
            optimizer.step()
            if step >= WARM_UP:
                seconds.append((time.perf_counter() - start) / COUNT)
    return [statistics.median(seconds) for seconds in taken]


def hook_of(optimizer: Any) -> Any:
    def hook(p: Tensor) -> None:
        optimizer.step_param(p, optimizer.param_groups[0])
        p.grad = None

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alone", description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each (default: 10)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| parameter | stepped | ppsf_dist, us | prodigy-plus-schedule-free, us | ratio |\n|---|---|---|---|---|")
    for measure, stepped in ((one_by_one, "one by one"), (in_backward, "in a backward pass")):
        for rows, columns in SHAPES:
            ours, reference = measure([ProdigyPlusScheduleFree, Reference], (rows, columns), arguments.steps)
            print(
                f"| {rows} x {columns} | {stepped} | {ours * 1e6:,.0f} | {reference * 1e6:,.0f} "
                f"| {ours / reference:.2f} |"
            )


if __name__ == "__main__":
    main()
