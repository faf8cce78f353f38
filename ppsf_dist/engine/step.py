"""The picture of a step, alone, and what an exception does to it."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from ppsf_dist.engine.part_numbers import PartNumbers, Verdict
from ppsf_dist.engine.plan import Plan
from ppsf_dist.methods.base import Cause, StepNumbers
from ppsf_dist.methods.sums import Stat
from ppsf_dist.state.writes import Writes


class PartStep:
    """One step of the parameters of a plan: :meth:`measure`, then :meth:`write`.

    Measuring only reads. An exception in it undoes the step: there is nothing to undo. From the last sum on
    (``plan.reductions.decided``) the other ranks write, so this one must: what follows is computed from what is there,
    and writing goes on where an exception has ended it, if :meth:`write` is called again.
    """

    def __init__(self, plan: Plan, step: StepNumbers) -> None:
        self._plan, self._step = plan, step
        self._writes = Writes()
        self._unsound_weights: Tensor | None = None

    def measure(self) -> None:
        """The upper half of the picture: pass 1, reduce 1, moments, pass 2, reduce 2 (and a third for late masks)."""
        plan, passes, reductions = self._plan, self._plan.passes, self._plan.reductions
        plan.capture_unseen()
        plan.begin(self._step.unsound)
        coefficients, stats = self.numbers.coefficients, reductions.table.stats

        passes.pass_1(coefficients, self._factors_before, reductions.sums, stats)
        if plan.reduces_sums_early:
            reductions.reduce()
        if plan.needs_norms:
            passes.pass_2(coefficients, self._factors, stats)
        if plan.needs_norms or not plan.reduces_sums_early:
            reductions.reduce()
        if reductions.masks is not None:
            scales = self.numbers.scales(stats)
            passes.count_masks(coefficients, self._factors, scales, reductions.masks.stats)
            reductions.reduce()

    def write(self) -> None:
        """The lower half: moments, pass 3, numbers. Nothing, if there is a cause not to."""
        plan, writes = self._plan, self._writes
        # All that reads what is written below comes first.
        moments, factors, scales, verdict = self._moments, self._factors, self._scales, self.verdict
        writes.restart()
        writes.put(lambda: plan.moments.committed(moments, verdict.gates.moments))
        plan.passes.pass_3(self.numbers.coefficients, factors, scales, verdict.gates, self.numbers.keys, writes)
        writes.put(lambda: self.numbers.committed(plan.reductions.table.stats, verdict))
        plan.end()

    @cached_property
    def numbers(self) -> PartNumbers:
        """The numbers of this part's parameters."""
        return PartNumbers(self._step, self._plan.parameters, self._plan.traits)

    @cached_property
    def verdict(self) -> Verdict:
        """What all ranks have decided: whether this part is written, and for what cause it is not."""
        reductions = self._plan.reductions
        verdict = self.numbers.verdict(reductions, self._plan.host)
        asks = verdict.known is not None and verdict.known.cause in (Cause.GRADIENT, Cause.WEIGHTS)
        return verdict.with_cause(Cause.WEIGHTS) if asks and self._weights_are_unsound() else verdict

    @cached_property
    def _moments(self) -> Tensor:
        """The factored moments after the step, in scratch."""
        return self.numbers.moments(self._plan.moments, self._plan.reductions.sums)

    @cached_property
    def _factors_before(self) -> Tensor:
        """Square roots of the moments before the step, if anybody asks for them."""
        moments = self._plan.moments
        return moments.factors(moments.values) if self._plan.adopts else moments.values

    @cached_property
    def _factors(self) -> Tensor:
        """Square roots for the denominator: of the moments after the step, under ADOPT of those before it."""
        if not self._plan.reduces_sums_early:
            return self._factors_before
        return self.numbers.factors(self._plan.moments, self._moments)

    @cached_property
    def _scales(self) -> Tensor:
        reductions = self._plan.reductions
        if reductions.masks is not None:
            reductions.table.stats[:, Stat.LATE_MASK] = reductions.masks.stats[:, Stat.LATE_MASK]
        return self.numbers.scales(reductions.table.stats)

    def _weights_are_unsound(self) -> bool:
        """Whether it is the weights, on any rank, that made the gradients what they are. All ranks ask together."""
        if self._unsound_weights is None:
            team, count = self._plan.team, self._plan.count_unsound_weights()
            try:
                team.sum_(count, why="the search for weights that are not finite")
            finally:
                if team.arrived:
                    self._unsound_weights = count
        return bool(self._unsound_weights)
