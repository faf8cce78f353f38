"""Every switch on an accelerator beside the same run on the CPU: ``python -m tests.on_device [--device cuda]``.

Prints a line for each switch and dtype and ends with 1 if one of them is off. From the second step on, a wait of the
host for the device is an error (CUDA only: other devices cannot say so).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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


def train(device: str, dtype: torch.dtype, switch: Switch) -> Run:
    start = initial_weights(SHAPES, dtype=dtype)
    parameters = {name: nn.Parameter(value.to(device, copy=True)) for name, value in start.items()}
    optimizer = make_optimizer(parameters, 2, **switch)
    run = Run(start, {}, {})
    for step, gradients in enumerate(gradient_sequence(SHAPES, STEPS, dtype=dtype)):
        for name, parameter in parameters.items():
            gradient = gradients[name]
            assert gradient is not None
            parameter.grad = gradient.to(device)
        # Frozen statistics are another plan, made when the steps for them are over.
        replans = step == switch.get("prodigy_steps", 0)
        with no_waiting("" if step == 0 or replans else device):
            optimizer.step()
        optimizer.get_d()
        run.groups.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    run.weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="device to compare with the CPU (default: %(default)s)")
    device = parser.parse_args().device
    failed = 0
    for name, switch in EVERY.items():
        for dtype, allowed in ALLOWED.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                apart = difference(train(device, dtype, switch), train("cpu", dtype, switch))
            off = [key for key, bound in allowed.items() if not apart[key] <= bound]
            failed += bool(off)
            verdict = f"OFF in {' and '.join(off)}" if off else "ok"
            print(f"{name:32} {str(dtype):15} d {apart['d']:.0e}  weights {apart['weights']:.0e}  {verdict}")
    print(f"{failed} of {len(EVERY) * len(ALLOWED)} are off")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
