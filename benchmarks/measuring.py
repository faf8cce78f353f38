"""What a step costs beside that of another optimizer. Both step in turn, so that a drifting machine does not matter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ppsf_dist.kernels import report
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.harness.counting import count_collectives, count_host_syncs

WARM_UP = 3
"""Steps before the first measured one: state, plans, compiled kernels."""


@dataclass(frozen=True)
class Cost:
    """Of one step of an optimizer.

    Attributes:
        name: of the optimizer.
        seconds: median.
        ratio, least, most: to the baseline, pair by pair: median and extremes.
        state: bytes that live from step to step.
        peak: bytes that a step takes beyond that while it runs; None where they cannot be read.
        operators: calls of torch's dispatcher that compute something; on an accelerator the kernels that it launches.
        waits: reads of the device by the host.
        collectives, collective_bytes: issued by this rank.
    """

    name: str
    seconds: float
    ratio: float
    least: float
    most: float
    state: int
    peak: int | None
    operators: int
    waits: int
    collectives: int
    collective_bytes: int


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def seconds(optimizer: Any, device: str) -> float:
    """CPU time of one thread, which other processes do not count in; else elapsed time."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    optimizer.step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def compare(
    name: str, optimizer: Any, baseline: Any, device: str, steps: int, *, told: Callable[[], object] = lambda: None
) -> Cost:
    """Measure an optimizer beside the baseline.

    Args:
        name: of the optimizer.
        optimizer, baseline: whose parameters have gradients.
        device: of the parameters.
        steps: measured pairs.
        told: called after each pair.
    """
    for _ in range(WARM_UP):
        baseline.step()
        optimizer.step()
    peak = _peak_bytes(optimizer, device)
    operators = _Operators()
    with operators:
        optimizer.step()
    with count_host_syncs() as waits, count_collectives() as collectives:
        optimizer.step()
    ours, theirs = [], []
    for _ in range(steps):
        theirs.append(seconds(baseline, device))
        ours.append(seconds(optimizer, device))
        told()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Cost(
        name=name,
        seconds=statistics.median(ours),
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        state=_state_bytes(optimizer),
        peak=peak,
        operators=operators.count,
        waits=waits.total,
        collectives=collectives.total,
        collective_bytes=sum(collectives.sizes),
    )


def copy_bandwidth(size: int = 1 << 30, times: int = 20) -> float:
    """Bytes that an accelerator reads and writes in a second when it copies so many from one place to another."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        target.copy_(source)
    torch.accelerator.synchronize()
    return 2 * size * times / (time.perf_counter() - start)


def _state_bytes(optimizer: Any) -> int:
    """Of tensors that are kept for parameters, and what our kernels keep beside them."""
    tensors = [v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, torch.Tensor)]
    kept = sum(use.kept for use in report(optimizer)) if isinstance(optimizer, DistributedOptimizer) else 0
    return sum(tensor.nbytes for tensor in tensors) + kept


def _peak_bytes(optimizer: Any, device: str) -> int | None:
    """What a step needs beyond what is there before it."""
    if device != "cpu":
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        optimizer.step()
        torch.accelerator.synchronize()
        return torch.accelerator.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    optimizer.step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A number of bytes from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
