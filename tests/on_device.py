"""Kernels on an accelerator beside the same on the CPU: ``python -m tests.on_device [--device cuda] [--jobs 16]``.

Runs of every switch, and of other classes of the package, with eager kernels, with Triton's where they compute the
switch, and those once more in a captured step, which has to be the same bit for bit; and one step of Triton's kernels
on every kind of shard with every switch that they compute. Prints a line for each and ends with 1 if one of them is
off. From the second step of a run on, a wait of the host for the device is an error (CUDA only: other devices cannot
say so).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ppsf_dist import CapturedStep
from ppsf_dist.kernels import report
from ppsf_dist.kernels.triton import available
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.family import FAMILY
from tests.harness.kernels import kernels as using
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.kernels.sides import CUTS, Cut, make
from tests.kernels.test_native import CLAIMED, compare
from tests.runs import Run, difference, make_optimizer, make_other
from tests.switches import EVERY, Switch
from tests.test_layouts import UNSTABLE

SHAPES = named_shapes("single_process")
STEPS = 8
ALLOWED = {torch.float32: {"d": 1e-6, "weights": 1e-5}, torch.bfloat16: {"d": 1e-6, "weights": 1e-1}}
"""In bf16 an element may fall on the other side of its rounding threshold: one rounding unit, of a short movement."""
SHARDS = CUTS | {
    "large": Cut.everything((700, 1528)),
    "large and odd": Cut.box((900, 1537), (3, 5), (700, 1519)),
    "large convolution": Cut.everything((170, 160, 3, 3)),
    "large and flat": Cut.range((900, 1537), 12345, 1000001),
    "large and long": Cut.everything((300001,)),
}
"""The large ones are several tasks."""


SISTERS = (
    ("Prodigy", "default"), ("Prodigy", "bias_correction"), ("SGDScheduleFree", "warmup"),
    ("AdamWScheduleFree", "decay"), ("RAdamScheduleFree", "sgd_phase"),
)  # fmt: skip
RUNS: dict[str, tuple[str, Switch]] = {
    **{name: ("ProdigyPlusScheduleFree", switch) for name, switch in EVERY.items()},
    **{f"{name} {variant}": (name, FAMILY[name].variants[variant]) for name, variant in SISTERS},
}
"""Classes and their arguments."""


class Found(NamedTuple):
    """What was compared, by how much it is apart, and whether that is too much."""

    what: str
    figure: str
    off: bool


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(device: str, dtype: torch.dtype, what: str, kernels: str, *, captured: bool = False) -> tuple[Run, set[str]]:
    """A run on a device, and the kernels that it has used."""
    start = initial_weights(SHAPES, dtype=dtype)
    parameters = {name: nn.Parameter(value.to(device, copy=True)) for name, value in start.items()}
    with using(kernels):
        name, switch = RUNS[what]
        optimizer: DistributedOptimizer
        if name == "ProdigyPlusScheduleFree":
            optimizer = make_optimizer(parameters, 2, **switch)
        else:
            optimizer = make_other(name, parameters, 2, **switch)
    step_once = CapturedStep(optimizer, warm_up=1) if captured else optimizer.step
    run = Run(start, {}, {})
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS, dtype=dtype)):
        for key, parameter in parameters.items():
            gradient = gradients[key]
            assert gradient is not None
            parameter.grad = gradient.to(device)
        # Frozen statistics are another plan, made when the steps for them are over. A capture waits by itself.
        replans = step == switch.get("prodigy_steps", 0) - 1 or (captured and step < 2)
        with no_waiting("" if step == 0 or replans else device):
            step_once()
        assert optimizer.skipped_steps == 0  # Waits for the numbers.
        run.groups.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    run.weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    return run, {use.backend for use in report(optimizer)}


def check_switch(device: str, name: str, dtype: torch.dtype) -> Iterator[Found]:
    """Runs with a switch, or of another class."""
    allowed = ALLOWED[dtype]
    if name in UNSTABLE and dtype == torch.float32:
        allowed = UNSTABLE[name]
    reference, _ = train("cpu", dtype, name, "auto")
    fast = None
    for kernels in ("eager", "native"):
        ours, backends = train(device, dtype, name, kernels)
        if kernels == "native" and "eager" in backends:
            continue
        fast = ours if kernels == "native" else None
        apart = difference(ours, reference)
        off = any(not apart[key] <= bound for key, bound in allowed.items())
        yield Found(kernels, f"d {apart['d']:.0e}  weights {apart['weights']:.0e}", off)
    if fast is not None and device.startswith("cuda"):
        ours, _ = train(device, dtype, name, "native", captured=True)
        same = ours.groups == fast.groups and all(torch.equal(v, fast.weights[k]) for k, v in ours.weights.items())
        yield Found("captured", "the same" if same else "another run", not same)


def check_shards(device: str, name: str, dtype: torch.dtype) -> Iterator[Found]:
    """A step on each kind of shard, and on all of them together, some without a gradient, closed, or a replica."""
    kernels = available.load(torch.device(device))
    every = list(SHARDS.values())
    some = {what: range(first, len(every), 7) for first, what in enumerate(("missing", "closed", "replicas"))}
    for what, cuts, parts in [*((what, [cut], {}) for what, cut in SHARDS.items()), ("together", every, some)]:
        here, there = (make(cuts, CLAIMED[name], dtype, seed=1, device=where, **parts) for where in ("cpu", device))
        try:
            compare(here, kernels, exactly=False, on_device=there)
        except AssertionError as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            yield Found(f"a step, {what}", f"{line} {error}", True)
        else:
            yield Found(f"a step, {what}", "the same but for rounding", False)


CHECKS = {"runs": check_switch, "shards": check_shards}


def check(kind: str, device: str, name: str, dtype: torch.dtype) -> list[Found]:
    """Everything of a kind about one switch and dtype."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return list(CHECKS[kind](device, name, dtype))
        except Exception as error:
            # The others are worth knowing.
            return [Found(kind, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="device to compare with the CPU (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, since most of it is compilation (default: 1)")
    parser.add_argument("--kind", nargs="+", default=list(CHECKS), choices=list(CHECKS), help="(default: both)")
    parser.add_argument(
        "--switch", nargs="+", metavar="NAME", help="of tests/switches.py, or a class and a variant (default: all)"
    )
    arguments = parser.parse_args()
    names = {"runs": list(RUNS), "shards": list(CLAIMED)}
    failed = compared = 0
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(check, kind, arguments.device, name, dtype): (name, dtype)
            for kind in arguments.kind
            for name in names[kind]
            for dtype in ALLOWED
            if arguments.switch is None or name in arguments.switch
        }
        for done in as_completed(waiting):
            name, dtype = waiting[done]
            for what, figure, off in done.result():
                failed, compared = failed + off, compared + 1
                print(f"{name:32} {str(dtype):15} {what:24} {figure}  {'OFF' if off else 'ok'}", flush=True)
    print(f"{failed} of {compared} are off")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
