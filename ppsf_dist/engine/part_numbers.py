"""The numbers of a step that belong to a parameter, as fp64 vectors over the parameters of a plan on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppsf_dist.algorithm import direction, rounding
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.reductions import Outcome, Reductions
from ppsf_dist.kernels.interface import Coefficients, Gates, Scales
from ppsf_dist.methods.base import Cause, StepNumbers
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding.slots import SlotTable
from ppsf_dist.state.inventory import PARAMETER_NUMBERS
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.writes import Write


@dataclass
class Traits:
    """What never changes about the parameters of a plan, as vectors over slots on the device.

    The flags say what no parameter needs, so that nothing is computed for it.
    """

    group_of: Tensor
    membership: Tensor
    numel: Tensor
    adopt: Tensor
    stableadamw: Tensor
    orthograd: Tensor
    early_mask: Tensor
    late_mask: Tensor
    gain_is_d: Tensor
    focus_fixed: Tensor
    momentum_of_d: Tensor
    rounds_samples: Tensor
    rounds_s: Tensor
    identity: Tensor
    any_gain: bool
    any_adopt: bool
    any_orthograd: bool
    any_mask: bool
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
        membership = torch.zeros(len(switches), len(of_slot), dtype=torch.float64)
        membership[groups, torch.arange(len(of_slot))] = 1
        divides = [
            s.second_moment and s.schedulefree and not s.atan2 and not s.focus and not (s.adopt and not s.quirks)
            for s in of_slot
        ]
        return cls(
            group_of=groups.to(device),
            membership=membership.to(device),
            numel=torch.tensor(sizes, dtype=torch.float64, device=device),
            adopt=flags([s.adopt for s in of_slot]),
            stableadamw=flags([s.stableadamw for s in of_slot]),
            orthograd=flags([s.orthograd for s in of_slot]),
            early_mask=flags([s.counts_mask_early for s in of_slot]),
            late_mask=flags([s.counts_mask_late for s in of_slot]),
            gain_is_d=flags(divides),
            focus_fixed=flags([s.focus and not s.quirks for s in of_slot]),
            momentum_of_d=flags([not (s.adopt and not s.quirks) for s in of_slot]),
            rounds_samples=flags([rounds and s.quirks for rounds, s in zip(bf16, of_slot, strict=True)]),
            rounds_s=flags([rounds and s.quirks for rounds, s in zip(s_in_bf16, of_slot, strict=True)]),
            identity=torch.tensor([slot.identity for slot in table.slots], device=device),
            any_gain=any(divides),
            any_adopt=any(s.adopt for s in of_slot),
            any_orthograd=any(s.orthograd for s in of_slot),
            any_mask=any(s.counts_mask_early or s.counts_mask_late for s in of_slot),
            any_speed=any(s.speed for s in of_slot),
            any_random=any(rounds and s.stochastic_rounding for rounds, s in zip(bf16, of_slot, strict=True)),
        )


@dataclass
class Part(Traits):
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


@dataclass(frozen=True)
class Verdict:
    """What all ranks have decided about a part, from the same sums.

    Attributes:
        active: bool vector over parameters: some rank has a gradient.
        gates: what is written.
        cause: the :class:`Cause` not to write, fp64, on the device.
        known: the same where the host may read it without waiting, else None.
    """

    active: Tensor
    gates: Gates
    cause: Tensor
    known: Known | None

    def with_cause(self, cause: Cause) -> Verdict:
        """The verdict of nothing to write for another cause."""
        return replace(self, cause=torch.full_like(self.cause, cause))


class PartNumbers:
    """The numbers of one step that belong to the parameters of one part, in the order in which the step needs them."""

    def __init__(self, step: StepNumbers, parameters: Tensor, traits: Traits) -> None:
        self._step, self._parameters, self._traits = step, parameters, traits
        updates = parameters[PARAMETER_NUMBERS.index("step")]
        # ADOPT's first step, of the group or of a parameter that comes late, only sets the second moment.
        self._adopt_first = traits.adopt & ((step.k[traits.group_of] == 1) | (updates == 0))
        self._of = Part(**vars(traits), updates=updates, adopt_first=self._adopt_first)
        self.coefficients = Coefficients.of(step.coefficients(self._of))
        self.keys = traits.identity
        if traits.any_random:
            self.keys = rounding.keys(step.seed, updates.long(), traits.identity)

    def moments(self, moments: FactoredMoments, sums: Tensor) -> Tensor:
        """The factored moments after this step, in scratch, from the sums of all ranks."""
        if not len(moments):
            return sums
        return moments.updated(sums, self.coefficients["beta2"], self.coefficients["square_weight"])

    def factors(self, moments: FactoredMoments, new: Tensor) -> Tensor:
        """Square roots for the denominator: of the new moments, or of the old ones under ADOPT."""
        factors = moments.factors(new)
        if not self._traits.any_adopt:
            return factors
        return torch.where(self._traits.adopt[moments.slot_of], moments.factors(moments.values), factors)

    def scales(self, stats: Tensor) -> Tensor:
        """The table of :class:`Scales` (fp32) from the sums of all ranks."""
        t = self._traits
        one = torch.ones_like(t.numel)
        late = one
        factor = torch.where(t.gain_is_d, self.coefficients["d"].double(), one) if t.any_gain else one
        if t.any_mask:
            factor = factor * torch.where(t.early_mask, direction.mask_scale(stats[:, Stat.EARLY_MASK], t.numel), one)
            late = torch.where(t.late_mask, direction.mask_scale(stats[:, Stat.LATE_MASK], t.numel), one)
        uu = stats[:, Stat.UU] * factor * factor
        rms = torch.where(t.stableadamw, direction.soft_rms_scale(uu, t.numel), one)
        amount, pull = rms * factor, torch.zeros_like(one)
        if t.any_orthograd:
            keep, along = direction.orthogonal_scales(uu, stats[:, Stat.WW], stats[:, Stat.WU] * factor, t.numel)
            amount, pull = torch.where(t.orthograd, amount * keep, amount), torch.where(t.orthograd, rms * along, pull)
        rows = Scales(amount=amount, pull=pull, mask=late, advance=amount * self._step.delta[t.group_of])
        return torch.stack(rows).float()

    def verdict(self, reductions: Reductions, host: HostAccess) -> Verdict:
        """What is written: nothing if there is a cause not to, and only parameters that have a gradient."""
        stats, sums, outcome = reductions.table.stats, reductions.sums, reductions.last.outcome
        gradients = stats[:, Stat.LARGEST_SQUARE].isfinite().all() & sums.isfinite().all()
        # ADOPT's first step divides by an empty moment: its direction does not count.
        uu = torch.where(self._adopt_first, torch.zeros_like(stats[:, 0]), stats[:, Stat.UU])
        state = (stats[:, Stat.DOT : Stat.UU] + (uu + stats[:, Stat.WW]).unsqueeze(1)).isfinite().all()
        cause = torch.where(gradients, torch.where(state, Cause.NOTHING, Cause.WEIGHTS), Cause.GRADIENT)
        cause = torch.where(outcome[Outcome.UNSOUND] > 0, Cause.NUMBER, cause)
        cause = torch.where(outcome[: Outcome.UNSOUND].sum() > 0, Cause.FAILURE, cause).double()

        active = stats[:, Stat.PRESENT] > 0
        moments = active & (cause == Cause.NOTHING)
        weights = moments & ~self._adopt_first
        if not host.free:
            return Verdict(active, Gates(moments, weights, None), cause, None)
        here = torch.cat((moments.double(), weights.double(), cause.view(1), outcome)).tolist()
        count = len(moments)
        gates = Gates(moments, weights, ([x > 0 for x in here[:count]], [x > 0 for x in here[count : 2 * count]]))
        return Verdict(active, gates, cause, Known(int(here[2 * count]), here[2 * count + 1 :]))

    def committed(self, stats: Tensor, verdict: Verdict) -> list[Write]:
        """This part counted in the step, and what belongs to its parameters after it."""
        t, step, gates = self._traits, self._step, verdict.gates
        moved = verdict.active & ~self._adopt_first
        counted = moved & step.adapts[t.group_of]
        after = self._parameters.clone()
        numerator, denominator = step.contributions(stats, self._of, counted & gates.weights, after)
        after[PARAMETER_NUMBERS.index("step")].add_(gates.moments)
        totals = step.totals.clone()
        for row, share in zip(totals, (numerator, denominator, moved.double()), strict=False):
            row.add_((t.membership * share).sum(1))
        totals[3].copy_(torch.maximum(totals[3], verdict.cause))
        return [Write([self._parameters, step.totals], [after, totals])]
