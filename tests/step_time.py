"""What a step costs beside torch's fused AdamW: ``python -m tests.step_time [--help]``.

All step the same parameters in turn; what is printed is the median time and the median of the ratios pair by pair, so
that a machine whose speed drifts does not matter.
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
from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference
from torch import nn

from ppsf_dist import ProdigyPlusScheduleFree

Shapes = list[tuple[int, ...]]
RANK = 16
WIDTHS = (1024, 2048, 3072, 4096)
"""Of the adapters in the set "lora"."""


def gpt2() -> Shapes:
    """The 148 tensors of GPT-2 small, 124 million elements."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


SETS: dict[str, Shapes] = {
    "gpt2": gpt2(),
    "matrix": [(4096, 4096)],
    # Both halves of each adapter: A maps to the rank of 16, B from it and starts at zero.
    "lora": [*[(RANK, n) for n in WIDTHS], *[(n, RANK) for n in WIDTHS]] * 125,
    "tiny": [(16, 64)] * 500,
}


def starts_at_zero(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a set is the B of an adapter."""
    return name == "lora" and shape[1] == RANK


def parameters(name: str, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in SETS[name]:
        scale = 0.0 if starts_at_zero(name, shape) else 0.02
        made.append(nn.Parameter(torch.randn(shape, generator=generator).mul_(scale).to(device, dtype)))
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).mul_(0.01).to(device, dtype)
    return made


def seconds(optimizer: Any, device: str) -> float:
    """CPU time on a CPU, where other processes disturb; elapsed time on an accelerator."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    optimizer.step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def measure(name: str, dtype: torch.dtype, device: str, steps: int) -> None:
    shapes = SETS[name]
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizers = {
            "fused AdamW": torch.optim.AdamW(parameters(name, dtype, device), fused=True),
            "ppsf_dist": ProdigyPlusScheduleFree(parameters(name, dtype, device)),
            "reference": Reference(parameters(name, dtype, device)),
        }
        for optimizer in optimizers.values():
            for _ in range(2):
                optimizer.step()
        times = {key: [] for key in optimizers}  # type: dict[str, list[float]]
        for _ in range(steps):
            for key, optimizer in optimizers.items():
                times[key].append(seconds(optimizer, device))
    for key, of in times.items():
        state = sum(
            value.numel() * value.element_size()
            for entries in optimizers[key].state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor)
        )
        ratio = statistics.median(a / b for a, b in zip(of, times["fused AdamW"], strict=True))
        print(
            f"{name:8} {str(dtype):15} {key:12} {statistics.median(of) / numel * 1e9:7.2f} ns/element  x{ratio:4.1f}   "
            f"state {state / numel:.2f} bytes/element"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=list(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--steps", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets:
        measure(name, getattr(torch, arguments.dtype), arguments.device, arguments.steps)


if __name__ == "__main__":
    main()
