"""The monitor: follows every step of an optimizer and makes a row of numbers at each interval."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist.engine.learning_rates import readable
from ppsf_dist.engine.reports import StepReport
from ppsf_dist.evaluation import innermost
from ppsf_dist.monitor.advice import Advice
from ppsf_dist.monitor.picture import draw
from ppsf_dist.monitor.sinks import JsonLines, sink_of
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.release import RELEASE


class Monitor:
    """Follows d and what belongs to it.

    Each row has ``step``, ``skipped`` (steps that changed nothing so far), ``seconds`` since the monitor began,
    ``step_share`` (the part of the time since the last row that was spent in the optimizer's step, by the host's
    clock), what ``log`` was given, and ``groups``, one for each parameter group:

    * ``d``: the step size that was found. ``d_lr`` is d times lr, the length of a step of z; ``d_effective_lr`` is d
      times effective_lr, the part of it that the training weights y take at once (effective_lr alone is without d).
    * ``estimate``: the sums that d comes from, ``numerator / denominator``: d grows where this is above it.
    * ``growth``: d over d in the row before.
    * ``gradient_norm``, ``update_norm``: lengths of the gradient and of the step of z.
    * ``update_rms``: root mean square of the step of z, in units of d * lr. StableAdamW shortens what would be above 1
      to its square root, so 2 here was 4.

    A row costs no wait for the device, and no message between ranks. On an accelerator it comes one step late. With
    several ranks only rank 0 writes and warns; make one on every rank or on rank 0 alone.

    Args:
        optimizer: of this package, or what a trainer has put around one.
        every: steps between two rows.
        to: where rows go, beside ``rows``: a path for a ``.jsonl`` file, a ``SummaryWriter``, a run of W&B, the
            module ``mlflow``, a function of one row, or several of these.
        model: to look for BatchNorm in.
        settings: what tells this run from others, for the first line of a file; the optimizer's own are there already.

    Raises:
        TypeError: the optimizer is none of this package, or ``to`` cannot take rows.
        ValueError: ``every`` is below 1.
    """

    def __init__(
        self,
        optimizer: Any,
        every: int = 10,
        to: Any = (),
        *,
        model: nn.Module | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        inner = innermost(optimizer)
        if not isinstance(inner, DistributedOptimizer):
            raise TypeError(f"optimizer is a {type(inner).__name__}: a monitor follows the optimizers of ppsf_dist")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} is out of range: allowed is a number of steps >= 1")
        targets = list(to) if isinstance(to, list | tuple) else [to]
        self.optimizer, self.every, self.rows = inner, every, list[dict[str, Any]]()
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self._sinks = [sink_of(target) for target in targets] if self._writes else []
        self._advice = Advice(inner, model)
        self._given: dict[str, Any] = {}
        self._began = self._since = time.perf_counter()
        self._in_step = self._entered = 0.0
        self._elements = [sum(p.numel() for p in group["params"]) for group in inner.param_groups]
        about = {"about": _about(inner, dict(settings or {}), self._elements)}
        for sink in self._sinks:
            if isinstance(sink, JsonLines):
                sink.begin(about, goes_on=inner.param_groups[0]["k"] > inner.method.numbers["k"])
        self._handles = [
            inner.observe(self._see),
            inner.register_step_pre_hook(self._enter),
            inner.register_step_post_hook(self._leave),
        ]

    def log(self, **numbers: float | Tensor) -> None:
        """Give numbers to the next row, such as ``loss`` and ``tokens_per_second``.

        Args:
            numbers: the last of each name before the row counts. A tensor is read when the row is made, which waits for
                its device once in an interval.
        """
        self._given |= numbers

    def plot(self, path: str | Path) -> None:
        """Draw d, its estimate, the size of updates and the loss over the steps so far. Needs matplotlib.

        Args:
            path: file to write, .png or another that matplotlib knows.
        """
        draw(self.rows, Path(path))

    def close(self) -> None:
        """Stop following, and say what can only be said at the end. Leaving a ``with`` does this."""
        self.optimizer._engine.settle()
        for handle in self._handles:
            handle.remove()
        if self._handles and self._writes:
            self._warn(self._advice.at_the_end())
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _enter(self, *_: Any) -> None:
        self._entered = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self._in_step += time.perf_counter() - self._entered

    def _see(self, report: StepReport) -> None:
        if not self._writes:
            return
        self._warn(self._advice.on(report))
        if report.steps % self.every == 0 and (not self.rows or self.rows[-1]["step"] != report.steps):
            self._add(report)

    def _add(self, report: StepReport) -> None:
        now = time.perf_counter()
        row: dict[str, Any] = {
            "step": report.steps,
            "skipped": report.skipped,
            "seconds": now - self._began,
            "step_share": self._in_step / max(now - self._since, 1e-9),
            **{name: float(value) for name, value in self._given.items()},
            "groups": [self._group(index, numbers) for index, numbers in enumerate(report.groups)],
        }
        self._since, self._in_step, self._given = now, 0.0, {}
        self.rows.append(row)
        for sink in self._sinks:
            sink(row)

    def _group(self, index: int, numbers: Mapping[str, float | None]) -> dict[str, float | None]:
        lr, d = readable(self.optimizer.param_groups[index]["lr"]), numbers.get("d")
        before = self.rows[-1]["groups"][index].get("d") if self.rows else None
        effective = numbers.get("effective_lr")
        numerator, denominator = numbers.get("d_numerator"), numbers.get("d_denom")
        update, length = numbers["update_norm"], None if lr is None else lr * (1.0 if d is None else d)
        found = {
            "d": d,
            "lr": lr,
            "d_lr": None if d is None else length,
            "d_effective_lr": None if d is None or effective is None else d * effective,
            "numerator": numerator,
            "denominator": denominator,
            "estimate": numerator / denominator if numerator is not None and denominator else None,
            "growth": d / before if d is not None and before else None,
            "gradient_norm": numbers["gradient_norm"],
            "update_norm": update,
            "update_rms": update / (length * math.sqrt(self._elements[index])) if update and length else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _warn(self, messages: Iterable[str]) -> None:
        for message in messages:
            warnings.warn(message, UserWarning, stacklevel=2)


def _about(optimizer: DistributedOptimizer, settings: dict[str, Any], elements: list[int]) -> dict[str, Any]:
    first = optimizer.param_groups[0]
    return {
        "optimizer": type(optimizer).__name__,
        **{name: first[name] for name in optimizer.method.arguments if name in first},
        "groups": len(elements),
        "elements on rank 0": sum(elements),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "ppsf_dist": RELEASE,
        "torch": torch.__version__,
        **settings,
    }
