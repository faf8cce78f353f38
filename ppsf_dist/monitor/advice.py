"""What goes wrong with d, and why: each is said once, with the cause that the numbers show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ppsf_dist.batch_norm import not_recalibrated
from ppsf_dist.engine.reports import StepReport

STEPS_AT_D0 = 100
"""d has left d0 by then in every training that went well in docs/quality.md."""
CLIPPED_PART = 0.9
"""Of the steps whose gradients have the same length: then something clips them."""
SAME_NORM = 1e-4
"""Relative. Clipping leaves less, torch's 1e-6 over the length before it."""
STEPS_TO_SETTLE = 1000
"""Before these no growth is too much."""
GROWTH_WITHOUT_END = 4.0
"""Of d over the second half of a run: on the workloads of docs/quality.md it does not grow at all in that half."""


class Advice:
    """Follows the reports of one optimizer.

    Args:
        optimizer: of this package.
        model: to look for BatchNorm in, or None.
    """

    def __init__(self, optimizer: Any, model: nn.Module | None) -> None:
        self.optimizer, self.model = optimizer, model
        self._said: set[str] = set()
        count = len(optimizer.param_groups)
        self._norms: list[list[float]] = [[] for _ in range(count)]
        self._clipped: list[float] = []
        self._highest = [-math.inf] * count
        self._history: list[tuple[int, float]] = []
        self._steps = 0
        self._averages = any(optimizer.method.switches(group).schedulefree for group in optimizer.param_groups)

    def on(self, report: StepReport) -> Iterator[str]:
        """What a step gives reason to say."""
        self._steps = report.steps
        if report.steps <= STEPS_AT_D0:
            self._lengths(report)
        for index, numbers in enumerate(report.groups):
            if index >= len(self._norms):
                return
            numerator, denominator = numbers.get("d_numerator"), numbers.get("d_denom")
            if numerator is not None and denominator:
                self._highest[index] = max(self._highest[index], numerator / denominator)
            d = numbers.get("d")
            if report.steps - report.skipped == STEPS_AT_D0 and d == self.optimizer.param_groups[index].get("d0"):
                yield from self._once(f"d0 {index}", self._stuck(index))
            if index == 0 and d is not None:
                yield from self._once("growth", self._growing(report.steps, d))

    def at_the_end(self) -> Iterator[str]:
        """What can be said only when training is over."""
        if self._averages and self._steps and not self.optimizer.was_evaluated:
            yield from self._once(
                "eval",
                "eval() was never called: what was evaluated or saved is the training weights y, not their average x, "
                "which Schedule-Free is there for; evaluate and save inside ppsf_dist.averaged(optimizer, model)",
            )
        norms = not_recalibrated(self.model) if self.model is not None and self._averages and self._steps else []
        if norms:
            yield from self._once(
                "batch norm",
                f"{norms[0] or 'the model'} is a BatchNorm, whose statistics are those of the training weights y: take "
                "them at the average with ppsf_dist.recalibrate_batch_norm(model, batches) before you evaluate or save",
            )

    def _lengths(self, report: StepReport) -> None:
        """Keep the lengths of the gradients, of each group and of all together, which is what is clipped."""
        norms = [numbers["gradient_norm"] or 0.0 for numbers in report.groups]
        for kept, norm in zip(self._norms, norms, strict=False):
            kept.append(norm)
        self._clipped.append(math.hypot(*norms))

    def _once(self, what: str, message: str | None) -> Iterator[str]:
        if message and what not in self._said:
            self._said.add(what)
            yield message

    def _stuck(self, index: int) -> str:
        group, norms = self.optimizer.param_groups[index], self._norms[index]
        d0 = group["d0"]
        where = f"d of group {index} is still d0 = {d0:g} after {STEPS_AT_D0} steps"
        if not any(norms):
            return f"{where}: all its gradients are zero; is it part of the graph, and is the loss not detached?"
        if not isinstance(lr := group["lr"], Tensor) and lr != 1.0:
            return f"{where}: lr is {lr:g}, and multiplies the step: leave it at 1.0"
        if 0 < group.get("prodigy_steps", 0) <= STEPS_AT_D0:
            return f"{where}: prodigy_steps={group['prodigy_steps']} stopped it"
        lengths = self._clipped
        middle = sorted(lengths)[len(lengths) // 2]
        same = sum(abs(length - middle) <= SAME_NORM * middle for length in lengths)
        if same >= CLIPPED_PART * len(lengths):
            return (
                f"{where}: in {same} of {len(lengths)} steps all gradients together had the length {middle:.3g}, so "
                "something clips or normalises them, which hides from Prodigy what it measures: leave it out (or every "
                "batch is the same one)"
            )
        highest = self._highest[index]
        if 0 < highest <= d0:
            return (
                f"{where}: its estimate was {highest:.3g} at most, so d0 is above it and d cannot fall; set d0 to "
                f"{highest / 10:.1g}"
            )
        return (
            f"{where}: its estimate was {highest:.3g} at most; the gradients do not point away from the start. A "
            "larger d0 (1e-5, 1e-4) or a larger batch gives them a direction"
        )

    def _growing(self, step: int, d: float) -> str | None:
        if not self._history or step >= self._history[-1][0] * 1.1:
            self._history.append((step, d))
        if step < STEPS_TO_SETTLE:
            return None
        half = next(value for at, value in reversed(self._history) if at <= max(1, step / 2))
        if d < GROWTH_WITHOUT_END * half:
            return None
        return (
            f"d has grown from {half:.3g} to {d:.3g} between steps {step // 2} and {step}, and still grows: stop it "
            "with prodigy_steps, slow it with growth_rate, or let it fall with beta4=0.99"
        )
