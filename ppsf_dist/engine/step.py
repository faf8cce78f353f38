"""The picture of a step, alone, and what an exception does to it."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from ppsf_dist.engine.part_numbers import Contribution, PartNumbers, Verdict
from ppsf_dist.engine.plan import Plan
from ppsf_dist.kernels.interface import KnownGates
from ppsf_dist.methods.base import Cause, StepNumbers
from ppsf_dist.methods.sums import Stat
from ppsf_dist.state.writes import Write, Writes


class Prepared(NamedTuple):
    """What is written after the passes, the numbers of the parameters, and where the passes may write."""

    parameters: Tensor
    known: KnownGates | None


class PartStep:
    """One step of the parameters of a plan: ``begin``, ``measure``, then ``write``.

    The first two only read. An exception in it undoes the step: there is nothing to undo. From the last sum on
    (``plan.reductions.decided``) the other ranks write, so this one must: what follows is computed from what is there,
    and writing goes on where an exception has ended it, if ``write`` is called again.
    """

    def __init__(self, plan: Plan, step: StepNumbers) -> None:
        self.plan, self._step = plan, step
        self._writes = Writes()
        self._went_ahead = False
        self._prepared: Prepared | None = None
        self._unsound_weights: Tensor | None = None

    def begin(self, *, goes_ahead: bool = False) -> None:
        """The picture from its top: pass 1, whose sums travel in several portions of a large plan.

        Args:
            goes_ahead: whether reduce 1 begins at once, if nothing else rides with it, and goes on until
                ``measure``. Otherwise it begins there.
        """
        plan, passes, reductions = self.plan, self.plan.passes, self.plan.reductions
        if not plan.host.captures:
            plan.capture_unseen()
        plan.begin(self._step.unsound)
        self.numbers.begin(plan.moments)

        goes_on = plan.team.is_alone and plan.sums_travel_alone
        *before, last = range(passes.portions)
        for portion in before:
            passes.pass_1(portion, goes_on=goes_on)
            reductions.start()
        passes.pass_1(last, goes_on=goes_on)
        self._went_ahead = goes_ahead and plan.sums_travel_alone
        if self._went_ahead:
            reductions.start()

    def measure(self) -> None:
        """The rest of the upper half: reduce 1, moments, pass 2, reduce 2 (and a third for late masks)."""
        plan, passes, reductions = self.plan, self.plan.passes, self.plan.reductions
        if self._went_ahead:
            reductions.finish()
        elif plan.reduces_sums_early:
            reductions.reduce()
        if plan.divides_early and plan.reduces_sums_early:
            self._fill_factors()
        if plan.needs_norms:
            passes.pass_2()
        if plan.needs_norms or not plan.reduces_sums_early:
            reductions.reduce()
        if reductions.masks is not None:
            self.numbers.fill_scales(reductions.table.stats)
            passes.count_masks()
            reductions.reduce()

    def write(self, cause: Tensor | None = None) -> None:
        """The lower half: moments, pass 3, numbers. Nothing, if there is a cause not to.

        Args:
            cause: what all parts of the step have found, where they are written together.
        """
        plan, writes = self.plan, self._writes
        if self._prepared is None:
            # All that reads what is written below.
            self._prepared = self._prepare(cause)
        parameters, known = self._prepared
        gate = plan.buffers.gates.moments
        writes.restart()
        plan.passes.write_moments(writes)
        plan.passes.pass_3(known, writes)
        writes.put(lambda: [Write([plan.parameters], [parameters.where(gate, plan.parameters)])])
        plan.end()

    def _fill_factors(self) -> None:
        self.plan.passes.update_moments()
        if self.plan.reduces_sums_early:
            # With ADOPT for all that is factored they stay those of the step before.
            self.plan.passes.fill_factors()

    def _prepare(self, cause: Tensor | None) -> Prepared:
        plan, numbers, stats = self.plan, self.numbers, self.plan.reductions.table.stats
        if cause is not None:
            # The step has learned its d since they were written.
            numbers.fill_coefficients()
        if not (plan.divides_early and plan.reduces_sums_early):
            self._fill_factors()
        if plan.reductions.masks is not None:
            stats[:, Stat.LATE_MASK] = plan.reductions.masks.stats[:, Stat.LATE_MASK]
        numbers.fill_scales(stats)
        # What this part alone would have done is not what all do.
        verdict = self.verdict if cause is None else self.verdict._replace(cause=cause, known=None)
        known = numbers.fill_gates(verdict, plan.host)
        return Prepared(self.contribution.parameters, known)

    @cached_property
    def numbers(self) -> PartNumbers:
        """The numbers of this part's parameters."""
        return self.plan.numbers.of_step(self._step)

    @cached_property
    def verdict(self) -> Verdict:
        """What all ranks have decided: whether this part is written, and for what cause it is not."""
        verdict = self.numbers.verdict(self.plan.reductions, self.plan.host)
        asks = verdict.known is not None and verdict.known.cause in (Cause.GRADIENT, Cause.WEIGHTS)
        return verdict.with_cause(Cause.WEIGHTS) if asks and self._weights_are_unsound() else verdict

    @cached_property
    def contribution(self) -> Contribution:
        """What this part adds to its step."""
        return self.numbers.contribution(self.plan.reductions.table.stats, self.verdict)

    def _weights_are_unsound(self) -> bool:
        """Whether it is the weights, on any rank, that made the gradients what they are. All ranks ask together."""
        if self._unsound_weights is None:
            team, count = self.plan.team, self.plan.count_unsound_weights()
            try:
                team.sum_(count, why="the search for weights that are not finite")
            finally:
                if team.arrived:
                    self._unsound_weights = count
        return bool(self._unsound_weights)
