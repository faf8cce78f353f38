"""The numbers of a step that belong to a parameter, as fp64 vectors over the parameters of a plan on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ppsf_dist.algorithm import direction, rounding
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.reductions import Outcome, Reductions
from ppsf_dist.kernels.codes import TRAITS
from ppsf_dist.kernels.interface import Buffers, KnownGates, Scales
from ppsf_dist.methods.base import Cause, StepNumbers
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding.slots import SlotTable
from ppsf_dist.state.inventory import PARAMETER_NUMBERS
from ppsf_dist.state.moments import FactoredMoments

_CAUSES = (
    Cause.WEIGHTS, Cause.GRADIENT, *[Cause.NUMBER if o is Outcome.UNSOUND else Cause.FAILURE for o in Outcome],
)  # fmt: skip
"""For sums of the state and of gradients that are not finite, and for each outcome."""


def _known_cause(numbers: Sequence[float]) -> int:
    """The cause not to write, from the sums of the table's columns, that of g^2 by row and column, and the outcomes.

    On an accelerator ``PartNumbers.verdict`` says the same with tensors.
    """
    state = numbers[Stat.DOT : Stat.LATE_MASK]
    gradients = (numbers[Stat.LARGEST_SQUARE], numbers[len(Stat)])
    happened = [not all(map(math.isfinite, state)), not all(map(math.isfinite, gradients))]
    happened += [ranks > 0 for ranks in numbers[len(Stat) + 1 :]]
    return max([int(cause) for cause, is_so in zip(_CAUSES, happened, strict=True) if is_so], default=Cause.NOTHING)


@dataclass
class Traits:
    """What never changes about the parameters of a plan, as vectors over slots on the device.

    The flags say what no parameter needs, so that nothing is computed for it.

    Attributes:
        causes: not to write, by ``_CAUSES``.
        one, zero: constants.
    """

    group_of: Tensor
    membership: Tensor
    numel: Tensor
    causes: Tensor
    adopt: Tensor
    stableadamw: Tensor
    measured: Tensor
    orthograd: Tensor
    early_mask: Tensor
    late_mask: Tensor
    rounds_samples: Tensor
    rounds_s: Tensor
    param_id: Tensor
    one: Tensor
    zero: Tensor
    any_adopt: bool
    any_focus: bool
    any_orthograd: bool
    any_mask: bool
    any_late_mask: bool
    any_rounds_samples: bool
    any_rounds_s: bool
    all_measured: bool
    any_stableadamw: bool
    all_stableadamw: bool
    any_speed: bool
    any_random: bool

    @classmethod
    def of(cls, table: SlotTable, switches: Sequence[Switches], device: torch.device) -> Traits:
        """Read them off the slots and the switches of their groups."""

        def flags(values: Sequence[bool]) -> Tensor:
            return torch.tensor(values, dtype=torch.bool, device=device)

        of_slot = [switches[slot.group] for slot in table.slots]
        # What the reference sums in bf16 comes out rounded: its samples s of fp32 weights, and all of bf16 weights.
        bf16 = [slot.dtype == "torch.bfloat16" for slot in table.slots]
        s_in_bf16 = [slot.dtype in ("torch.bfloat16", "torch.float32") for slot in table.slots]
        groups = torch.tensor([slot.group for slot in table.slots], dtype=torch.int64)
        sizes = [float(torch.Size(slot.shape).numel()) for slot in table.slots]
        membership = groups == torch.arange(len(switches)).unsqueeze(1)
        rounds_samples = [rounds and s.quirks for rounds, s in zip(bf16, of_slot, strict=True)]
        rounds_s = [rounds and s.quirks for rounds, s in zip(s_in_bf16, of_slot, strict=True)]
        numel = torch.tensor(sizes, dtype=torch.float64, device=device)
        return cls(
            group_of=groups.to(device),
            membership=membership.to(device),
            numel=numel,
            causes=torch.tensor(_CAUSES, dtype=torch.float64, device=device),
            adopt=flags([s.adopt for s in of_slot]),
            stableadamw=flags([s.stableadamw for s in of_slot]),
            measured=flags([s.needs_norms for s in of_slot]),
            orthograd=flags([s.orthograd for s in of_slot]),
            early_mask=flags([s.counts_mask_early for s in of_slot]),
            late_mask=flags([s.counts_mask_late for s in of_slot]),
            rounds_samples=flags(rounds_samples),
            rounds_s=flags(rounds_s),
            param_id=torch.tensor([slot.param_id for slot in table.slots], device=device),
            one=torch.ones_like(numel),
            zero=torch.zeros_like(numel),
            any_adopt=any(s.adopt for s in of_slot),
            any_focus=any(s.focus for s in of_slot),
            any_orthograd=any(s.orthograd for s in of_slot),
            any_mask=any(s.counts_mask_early or s.counts_mask_late for s in of_slot),
            any_late_mask=any(s.counts_mask_late for s in of_slot),
            any_rounds_samples=any(rounds_samples),
            any_rounds_s=any(rounds_s),
            all_measured=all(s.needs_norms for s in of_slot),
            any_stableadamw=any(s.stableadamw for s in of_slot),
            all_stableadamw=all(s.stableadamw for s in of_slot),
            any_speed=any(s.speed for s in of_slot),
            any_random=any(rounds and s.stochastic_rounding for rounds, s in zip(bf16, of_slot, strict=True)),
        )

    @property
    def are_common(self) -> bool:
        """Whether kernels know all numbers that these parameters need. Ranks that hold parts of them find the same."""
        return not (self.any_adopt or self.any_focus or self.any_orthograd)

    def as_bits(self) -> Tensor:
        """Those that kernels ask for, by ``ppsf_dist.kernels.codes.TRAITS``: an int64 vector over parameters."""
        return torch.stack([getattr(self, name).long() << bit for bit, name in enumerate(TRAITS)]).sum(0)


@dataclass
class StepTraits(Traits):
    """The traits of the parameters of a plan, and where they stand in one step.

    Attributes:
        updates: how many updates each has had.
        adopt_first: whether this is the first step of one that ADOPT steps.
    """

    updates: Tensor
    adopt_first: Tensor


class Known(NamedTuple):
    """What of a verdict the host knows at once: the cause, and how many ranks have said each outcome."""

    cause: int
    outcome: list[float]


class Verdict(NamedTuple):
    """What all ranks have decided about a part, from the same sums.

    Attributes:
        active: bool vector over parameters: some rank has a gradient, and the group does not pause.
        cause: the ``Cause`` not to write, fp64, on the device.
        known: the same where the host may read it without waiting, else None.
    """

    active: Tensor
    cause: Tensor
    known: Known | None

    def with_cause(self, cause: Cause) -> Verdict:
        """The verdict of nothing to write for another cause."""
        return self._replace(cause=torch.full_like(self.cause, cause))


class Contribution(NamedTuple):
    """What a part adds to its step.

    Attributes:
        totals: rows by ``ppsf_dist.methods.base.Total``, by groups, fp64.
        parameters: the numbers of its parameters after the step, if they are written.
    """

    totals: Tensor
    parameters: Tensor


class PartNumbers:
    """The numbers of one step that belong to the parameters of one part, in the order in which the step needs them.

    Args:
        step: those of the groups.
        parameters: those that parameters keep, by ``ppsf_dist.state.inventory.PARAMETER_NUMBERS``.
        traits: of the parameters.
        buffers: where the passes read them.
    """

    def __init__(self, step: StepNumbers, parameters: Tensor, traits: Traits, buffers: Buffers) -> None:
        self._step, self._parameters, self._traits, self._buffers = step, parameters, traits, buffers
        self._gain: tuple[Tensor, Tensor] | None = None
        self._advance: Tensor | None = None

    @cached_property
    def _now(self) -> StepTraits:
        """The parameters as they stand in this step."""
        t, updates = self._traits, self._parameters[PARAMETER_NUMBERS.index("step")]
        # ADOPT's first step, of the group or of a parameter that comes late, only sets the second moment.
        first = t.adopt & ((self._step.k[t.group_of] == 1) | (updates == 0)) if t.any_adopt else t.adopt
        return StepTraits(**vars(t), updates=updates, adopt_first=first)

    def begin(self, moments: FactoredMoments) -> None:
        """Write what passes 1 and 2 read and the step begins with."""
        self.fill_coefficients()
        if self._traits.any_adopt and len(moments):
            self._buffers.factors.copy_(moments.factors(moments.values))
        if self._traits.any_random:
            keys = rounding.keys(self._step.seed, self._now.updates.long(), self._traits.param_id)
            self._buffers.keys.copy_(keys)

    def fill_coefficients(self) -> None:
        """Write the coefficients as far as they are known: with d of this step once the step has learned it."""
        coefficients = self._buffers.coefficients
        coefficients.fill(self._step.table(coefficients.names), self._traits.group_of)
        for name, values in self._step.of_parameters(self._now).items():
            coefficients[name].copy_(values)
        self._gain = self._advance = None

    def fill_scales(self, stats: Tensor) -> None:
        """Write ``Scales`` from the sums of all ranks."""
        t = self._traits
        factor, rms = self._gain_and_rms(stats)
        amount, pull, late = rms * factor, t.zero, t.one
        if t.any_late_mask:
            late = torch.where(t.late_mask, direction.mask_scale(stats[:, Stat.LATE_MASK], t.numel), t.one)
        if t.any_orthograd:
            uu = stats[:, Stat.UU] * factor * factor
            keep, along = direction.orthogonal_scales(uu, stats[:, Stat.WW], stats[:, Stat.WU] * factor, t.numel)
            amount, pull = torch.where(t.orthograd, amount * keep, amount), torch.where(t.orthograd, rms * along, pull)
        self._advance = amount * self._step.delta[t.group_of]
        rows = Scales(amount=amount, pull=pull, mask=late, advance=self._advance)
        self._buffers.scales.copy_(torch.stack(rows))

    def _gain_and_rms(self, stats: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the direction before StableAdamW looks at it, and what StableAdamW multiplies it by.

        Asked for once all ranks have summed the norms, so that it is computed once.
        """
        if self._gain is None:
            t = self._traits
            factor, rms = self._buffers.coefficients["gain"].double(), t.one
            if t.any_mask:
                early = direction.mask_scale(stats[:, Stat.EARLY_MASK], t.numel)
                factor = factor * torch.where(t.early_mask, early, t.one)
            if t.any_stableadamw:
                rms = direction.soft_rms_scale(stats[:, Stat.UU] * factor * factor, t.numel)
                rms = rms if t.all_stableadamw else torch.where(t.stableadamw, rms, t.one)
            self._gain = factor, rms
        return self._gain

    def verdict(self, reductions: Reductions, host: HostAccess) -> Verdict:
        """What is written: nothing if there is a cause not to, and only parameters that have a gradient."""
        stats, sums, outcome = reductions.table.stats, reductions.sums, reductions.last.outcome
        columns = stats.sum(0)
        if self._traits.any_adopt:
            # ADOPT's first step divides by an empty moment: its direction does not count.
            columns[Stat.UU] = torch.where(self._now.adopt_first, 0.0, stats[:, Stat.UU]).sum()
        # In fp64 the sums of finite numbers are finite, and sums of others are not.
        numbers = torch.cat((columns, sums.sum(dtype=torch.float64).view(1), outcome))
        known = None
        if host.free:
            here = numbers.tolist()
            known = Known(_known_cause(here), here[-len(Outcome) :])
            cause = torch.tensor(float(known.cause), dtype=torch.float64)
        else:
            state = numbers[Stat.DOT : Stat.LATE_MASK].sum()
            gradients = numbers[Stat.LARGEST_SQUARE] + numbers[len(Stat)]
            sound = torch.stack((state, gradients)).isfinite()
            cause = torch.where(torch.cat((~sound, outcome > 0)), self._traits.causes, 0.0).amax()
        active = stats[:, Stat.PRESENT] > 0
        if self._step.pauses is not None:
            active &= ~self._step.pauses[self._traits.group_of]
        return Verdict(active, cause, known)

    def contribution(self, stats: Tensor, verdict: Verdict) -> Contribution:
        """What this part adds to its step, and what belongs to its parameters after it.

        Of a part that is not written only the cause and the gradient's norm count: what else its sums say may not be
        finite, and makes no d, because the step is void then.
        """
        t, step = self._traits, self._step
        counted = moved = verdict.active & ~self._now.adopt_first if t.any_adopt else verdict.active
        if step.adapts is not None:
            counted = moved & step.adapts[t.group_of]
        after = self._parameters.clone()
        numerator, denominator = step.contributions(stats, self._now, counted, after)
        after[PARAMETER_NUMBERS.index("step")].add_(1)
        shares = torch.stack((numerator, denominator, t.one, stats[:, Stat.GG], self._update_square(stats)))
        which = moved
        if counted is not moved or step.pauses is not None or t.any_adopt:
            which = torch.stack((counted, counted, moved, t.one > 0, moved)).unsqueeze(1)
        # No index_add_: it sums in no fixed order on a GPU, and d is the same bit for bit on every rank.
        summed = torch.where(t.membership & which, shares.unsqueeze(1), 0.0).sum(2)
        return Contribution(torch.cat((summed, verdict.cause.expand(1, len(step.k)))), after)

    def _update_square(self, stats: Tensor) -> Tensor:
        """Square of the length of each parameter's update before decay and masks; NaN where no pass measures it."""
        t, advance = self._traits, self._advance
        if advance is None or t.any_orthograd:
            factor, rms = self._gain_and_rms(stats)
            advance = factor * rms * self._step.delta[t.group_of]
        square = stats[:, Stat.UU] * advance.square()
        return square if t.all_measured else torch.where(t.measured, square, torch.nan)

    def fill_gates(self, verdict: Verdict, host: HostAccess) -> KnownGates | None:
        """Write what pass 3 may write, once the step has been decided."""
        t, gates = self._traits, self._buffers.gates
        moments = verdict.active
        if verdict.known is None:
            moments = moments & (verdict.cause == Cause.NOTHING)
        elif verdict.known.cause != Cause.NOTHING:
            moments = torch.zeros_like(moments)
        if self._step.moves is not None:
            moments = moments & self._step.moves[t.group_of]
        weights = moments & ~self._now.adopt_first if t.any_adopt else moments
        gates.moments.copy_(moments)
        gates.weights.copy_(weights)
        if not host.free:
            return None
        known = moments.tolist()
        return known, weights.tolist() if t.any_adopt else known
