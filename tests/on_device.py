"""Every switch on an accelerator beside the same run on the CPU: ``python -m tests.on_device [--device cuda]``.

With eager kernels, with Triton's where they compute the switch, and those once more in a captured step, which has to
be the same bit for bit. Prints a line for each switch and dtype and ends with 1 if one of them is off. From the second
step on, a wait of the host for the device is an error (CUDA only: other devices cannot say so).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ppsf_dist import CapturedStep
from ppsf_dist.kernels import report
from tests.harness.kernels import kernels as using
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.runs import Run, difference, make_optimizer
from tests.switches import EVERY, Switch

SHAPES = named_shapes("single_process")
STEPS = 8
ALLOWED = {torch.float32: {"d": 1e-6, "weights": 1e-5}, torch.bfloat16: {"d": 1e-6, "weights": 1e-1}}
"""In bf16 an element may fall on the other side of its rounding threshold: one rounding unit, of a short movement."""


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


def train(
    device: str, dtype: torch.dtype, switch: Switch, kernels: str, *, captured: bool = False
) -> tuple[Run, set[str]]:
    """A run on a device, and the kernels that it has used."""
    start = initial_weights(SHAPES, dtype=dtype)
    parameters = {name: nn.Parameter(value.to(device, copy=True)) for name, value in start.items()}
    with using(kernels):
        optimizer = make_optimizer(parameters, 2, **switch)
    step_once = CapturedStep(optimizer, warm_up=1) if captured else optimizer.step
    run = Run(start, {}, {})
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS, dtype=dtype)):
        for name, parameter in parameters.items():
            gradient = gradients[name]
            assert gradient is not None
            parameter.grad = gradient.to(device)
        # Frozen statistics are another plan, made when the steps for them are over. A capture waits by itself.
        replans = step == switch.get("prodigy_steps", 0) or (captured and step < 2)
        with no_waiting("" if step == 0 or replans else device):
            step_once()
        optimizer.get_d()
        run.groups.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    run.weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    return run, {use.backend for use in report(optimizer)}


def check(
    device: str, dtype: torch.dtype, switch: Switch, allowed: dict[str, float]
) -> Iterator[tuple[str, bool, str]]:
    """What was compared, whether it is off, and by how much."""
    reference, _ = train("cpu", dtype, switch, "auto")
    fast = None
    for kernels in ("eager", "native"):
        ours, backends = train(device, dtype, switch, kernels)
        if kernels == "native" and "eager" in backends:
            continue
        fast = ours if kernels == "native" else None
        apart = difference(ours, reference)
        off = any(not apart[key] <= bound for key, bound in allowed.items())
        yield kernels, off, f"d {apart['d']:.0e}  weights {apart['weights']:.0e}"
    if fast is not None and device.startswith("cuda"):
        ours, _ = train(device, dtype, switch, "native", captured=True)
        same = ours.groups == fast.groups and all(torch.equal(v, fast.weights[k]) for k, v in ours.weights.items())
        yield "captured", not same, "the same" if same else "another run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="device to compare with the CPU (default: %(default)s)")
    device = parser.parse_args().device
    failed = compared = 0
    for name, switch in EVERY.items():
        for dtype, allowed in ALLOWED.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for kernels, off, figure in check(device, dtype, switch, allowed):
                    failed, compared = failed + off, compared + 1
                    print(f"{name:32} {str(dtype):15} {kernels:9} {figure}  {'OFF' if off else 'ok'}", flush=True)
    print(f"{failed} of {compared} are off")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
