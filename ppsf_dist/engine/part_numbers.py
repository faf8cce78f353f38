"""The numbers of a step that belong to a parameter, as fp64 vectors over the parameters of a plan on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppsf_dist.algorithm import direction, rounding
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.reductions import Outcome, Reductions
from ppsf_dist.kernels.interface import Buffers, Gates, KnownGates, Scales
from ppsf_dist.methods.base import Cause, StepNumbers
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding.slots import SlotTable
from ppsf_dist.state.inventory import PARAMETER_NUMBERS
from ppsf_dist.state.moments import FactoredMoments


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
    measured: Tensor
    orthograd: Tensor
    early_mask: Tensor
    late_mask: Tensor
    gain_is_d: Tensor
    focus_fixed: Tensor
    momentum_of_d: Tensor
    rounds_samples: Tensor
    rounds_s: Tensor
    param_id: Tensor
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
        membership = groups == torch.arange(len(switches)).unsqueeze(1)
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
            measured=flags([s.needs_norms for s in of_slot]),
            orthograd=flags([s.orthograd for s in of_slot]),
            early_mask=flags([s.counts_mask_early for s in of_slot]),
            late_mask=flags([s.counts_mask_late for s in of_slot]),
            gain_is_d=flags(divides),
            focus_fixed=flags([s.focus and not s.quirks for s in of_slot]),
            momentum_of_d=flags([not (s.adopt and not s.quirks) for s in of_slot]),
            rounds_samples=flags([rounds and s.quirks for rounds, s in zip(bf16, of_slot, strict=True)]),
            rounds_s=flags([rounds and s.quirks for rounds, s in zip(s_in_bf16, of_slot, strict=True)]),
            param_id=torch.tensor([slot.param_id for slot in table.slots], device=device),
            any_adopt=any(s.adopt for s in of_slot),
            any_orthograd=any(s.orthograd for s in of_slot),
            any_mask=any(s.counts_mask_early or s.counts_mask_late for s in of_slot),
            any_speed=any(s.speed for s in of_slot),
            any_random=any(rounds and s.stochastic_rounding for rounds, s in zip(bf16, of_slot, strict=True)),
        )


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
        cause: the :class:`Cause` not to write, fp64, on the device.
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
        totals: rows by :class:`ppsf_dist.methods.base.Total`, by groups, fp64.
        parameters: the numbers of its parameters after the step, if they are written.
    """

    totals: Tensor
    parameters: Tensor


class PartNumbers:
    """The numbers of one step that belong to the parameters of one part, in the order in which the step needs them.

    Args:
        step: those of the groups.
        parameters: those that parameters keep, by :data:`ppsf_dist.state.inventory.PARAMETER_NUMBERS`.
        traits: of the parameters.
        buffers: where the passes read them.
    """

    def __init__(self, step: StepNumbers, parameters: Tensor, traits: Traits, buffers: Buffers) -> None:
        self._step, self._parameters, self._traits, self._buffers = step, parameters, traits, buffers
        updates = parameters[PARAMETER_NUMBERS.index("step")]
        # ADOPT's first step, of the group or of a parameter that comes late, only sets the second moment.
        self._adopt_first = traits.adopt & ((step.k[traits.group_of] == 1) | (updates == 0))
        self._of = StepTraits(**vars(traits), updates=updates, adopt_first=self._adopt_first)

    def begin(self, moments: FactoredMoments) -> None:
        """Write what passes 1 and 2 read and the step begins with."""
        self.fill_coefficients()
        if self._traits.any_adopt and len(moments):
            self._buffers.factors.copy_(moments.factors(moments.values))
        if self._traits.any_random:
            keys = rounding.keys(self._step.seed, self._of.updates.long(), self._traits.param_id)
            self._buffers.keys.copy_(keys)

    def fill_coefficients(self) -> None:
        """Write the coefficients as far as they are known: with d of this step once the step has learned it."""
        self._buffers.coefficients.fill(self._step.coefficients(self._of))

    def fill_scales(self, stats: Tensor) -> None:
        """Write :class:`Scales` from the sums of all ranks."""
        t = self._traits
        one = torch.ones_like(t.numel)
        factor, rms = self._gain_and_rms(stats)
        late = torch.where(t.late_mask, direction.mask_scale(stats[:, Stat.LATE_MASK], t.numel), one)
        amount, pull = rms * factor, torch.zeros_like(one)
        if t.any_orthograd:
            uu = stats[:, Stat.UU] * factor * factor
            keep, along = direction.orthogonal_scales(uu, stats[:, Stat.WW], stats[:, Stat.WU] * factor, t.numel)
            amount, pull = torch.where(t.orthograd, amount * keep, amount), torch.where(t.orthograd, rms * along, pull)
        rows = Scales(amount=amount, pull=pull, mask=late, advance=amount * self._step.delta[t.group_of])
        self._buffers.scales.copy_(torch.stack(rows))

    def _gain_and_rms(self, stats: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the direction before StableAdamW looks at it, and what StableAdamW multiplies it by."""
        t, one = self._traits, torch.ones_like(self._traits.numel)
        factor = self._buffers.coefficients["gain"].double()
        if t.any_mask:
            factor = factor * torch.where(t.early_mask, direction.mask_scale(stats[:, Stat.EARLY_MASK], t.numel), one)
        uu = stats[:, Stat.UU] * factor * factor
        return factor, torch.where(t.stableadamw, direction.soft_rms_scale(uu, t.numel), one)

    def verdict(self, reductions: Reductions, host: HostAccess) -> Verdict:
        """What is written: nothing if there is a cause not to, and only parameters that have a gradient."""
        stats, sums, outcome = reductions.table.stats, reductions.sums, reductions.last.outcome
        # In fp64 the sums of finite numbers are finite, and none of these is negative.
        gradients = (stats[:, Stat.LARGEST_SQUARE].sum() + sums.sum(dtype=torch.float64)).isfinite()
        # ADOPT's first step divides by an empty moment: its direction does not count.
        uu = torch.where(self._adopt_first, torch.zeros_like(stats[:, 0]), stats[:, Stat.UU])
        state = (stats[:, Stat.DOT : Stat.UU] + (uu + stats[:, Stat.WW]).unsqueeze(1)).isfinite().all()
        cause = torch.where(gradients, torch.where(state, Cause.NOTHING, Cause.WEIGHTS), Cause.GRADIENT)
        cause = torch.where(outcome[Outcome.UNSOUND] > 0, Cause.NUMBER, cause)
        cause = torch.where(outcome[: Outcome.UNSOUND].sum() > 0, Cause.FAILURE, cause).double()
        active = (stats[:, Stat.PRESENT] > 0) & ~self._step.pauses[self._traits.group_of]
        known = None
        if host.free:
            here = torch.cat((cause.view(1), outcome)).tolist()
            known = Known(int(here[0]), here[1:])
        return Verdict(active, cause, known)

    def contribution(self, stats: Tensor, verdict: Verdict) -> Contribution:
        """What this part adds to its step, and what belongs to its parameters after it."""
        t, step = self._traits, self._step
        moved = verdict.active & ~self._adopt_first
        counted = moved & step.adapts[t.group_of] & (verdict.cause == Cause.NOTHING)
        after = self._parameters.clone()
        numerator, denominator = step.contributions(stats, self._of, counted, after)
        after[PARAMETER_NUMBERS.index("step")].add_(1)
        shares = torch.stack(
            [
                numerator,
                denominator,
                moved.double(),
                stats[:, Stat.GG],
                torch.where(moved, self._update_square(stats), 0.0),
            ]
        )
        # No index_add_: it sums in no fixed order on a GPU, and d is the same bit for bit on every rank.
        summed = torch.where(t.membership, shares.unsqueeze(1), 0.0).sum(2)
        return Contribution(torch.cat((summed, verdict.cause.expand(1, len(step.k)))), after)

    def _update_square(self, stats: Tensor) -> Tensor:
        """Square of the length of each parameter's update before decay and masks; NaN where no pass measures it."""
        t = self._traits
        factor, rms = self._gain_and_rms(stats)
        square = stats[:, Stat.UU] * (factor * rms * self._step.delta[t.group_of]).square()
        return torch.where(t.measured, square, torch.nan)

    def fill_gates(self, verdict: Verdict, host: HostAccess) -> KnownGates | None:
        """Write what pass 3 may write, once the step has been decided."""
        step = self._step
        moments = verdict.active & (verdict.cause == Cause.NOTHING) & step.moves[self._traits.group_of]
        rows = torch.stack(Gates(moments=moments, weights=moments & ~self._adopt_first))
        for gate, row in zip(self._buffers.gates, rows, strict=True):
            gate.copy_(row)
        if not host.free:
            return None
        known_moments, known_weights = rows.tolist()
        return known_moments, known_weights
