"""What a step costs beside that of another optimizer. Both step in turn, so that a drifting machine does not matter."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ppsf_dist.kernels import report
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.harness.counting import count_collectives, count_host_syncs

WARM_UP = 3
"""Steps before the first measured one: state, plans, compiled kernels."""
CYCLES = 2e9
"""At most so many has a GPU in a second."""


@dataclass(frozen=True)
class Cost:
    """Of one step of an optimizer.

    Attributes:
        name: of the optimizer.
        seconds: median; on a GPU of the time that the GPU needs.
        host: on a GPU, of the time until the call returns, in seconds; None on a CPU.
        ratio, least, most: to the baseline, pair by pair: median and extremes.
        state: bytes that live from step to step.
        peak: bytes that a step takes beyond that while it runs; None where they cannot be read.
        operators: calls of torch's dispatcher that compute something; on a GPU the kernels and copies that it runs.
        waits: reads of the device by the host.
        collectives, collective_bytes: issued by this rank.
    """

    name: str
    seconds: float
    host: float | None
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


def seconds(optimizer: Any, device: str, ahead: float) -> tuple[float, float | None]:
    """What a step takes.

    On a CPU the time of one thread, which other processes do not count in; else elapsed time. On a GPU the time from
    the first kernel to the last: the GPU is kept busy for ``ahead`` seconds, as by a backward pass, while they are
    launched. And the time that launching them took.
    """
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        optimizer.step()
        return clock() - start, None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(ahead * CYCLES))
    first.record()
    begun = time.perf_counter()
    optimizer.step()
    host = time.perf_counter() - begun
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, host


def _host_seconds(optimizer: Any) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _waits(optimizer: Any) -> int:
    """How often a step on a GPU makes the host wait for it."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in said)


def _launches(optimizer: Any) -> int:
    """Kernels and copies that a step runs on a GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events())


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
    if device == "cpu":
        with _Operators() as operators:
            optimizer.step()
        launched, ahead = operators.count, 0.0
    else:
        launched, ahead = _launches(optimizer), 1.5 * max(map(_host_seconds, (optimizer, baseline)))
    with count_host_syncs() as waits, count_collectives() as collectives:
        optimizer.step()
    ours, theirs, hosts = [], [], []
    for _ in range(steps):
        theirs.append(seconds(baseline, device, ahead)[0])
        time_, host = seconds(optimizer, device, ahead)
        ours.append(time_)
        hosts += [] if host is None else [host]
        told()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Cost(
        name=name,
        seconds=statistics.median(ours),
        host=statistics.median(hosts) if hosts else None,
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        state=_state_bytes(optimizer),
        peak=peak,
        operators=launched,
        waits=waits.total if device == "cpu" else _waits(optimizer),
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
