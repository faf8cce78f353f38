"""The numbers of a step that belong to a group or a parameter, kept as fp64 vectors on the device.

A step never waits for the host: everything that depends on d, k or a norm is computed here, in a handful of vector
operations over groups and parameters. The plain numbers in ``param_groups`` are copies for people and loggers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm import averaging, direction, rounding, second_moment, step_size
from ppsf_dist.algorithm.step_size import SpeedState, StepSize, StepSizeRule
from ppsf_dist.host import HostAccess, PendingCopy
from ppsf_dist.kernels.interface import Coefficients, Gates, Scales, Stat
from ppsf_dist.moments import FactoredMoments
from ppsf_dist.options import Switches
from ppsf_dist.sharding.slots import SlotTable

Group = dict[str, Any]

GROUP_NUMBERS: dict[str, float] = {
    "d": 0.0,
    "d_prev": 0.0,
    "d_numerator": 0.0,
    "d_denom": 0.0,
    "prev_d_numerator": 0.0,
    "max_d_numerator": 0.0,
    "weight_sum": 0.0,
    "effective_lr": 1.0,
    "shared_d": 0.0,
    "k": 1.0,
    "skipped_steps": 0.0,
}
"""The adaptive numbers of a group and where they start (d at d0, effective_lr at lr)."""

PARAMETER_NUMBERS = ("step", "exp_avg_x0_dot", "max_x0_minus_l1_norm", "max_x0_minus_l2_norm")
"""Numbers of a parameter: how many updates it has had, and SPEED's memory."""

_HYPER = ("lr", "beta1", "beta2", "beta3", "weight_decay", "d0", "d_coef", "eps", "prodigy_steps", "schedulefree_c")
_HYPER_SWITCHES = ("d_limiter", "use_speed", "use_bias_correction", "use_schedulefree", "weight_decay_by_lr")


def initial_numbers(group: Group) -> dict[str, Any]:
    """The adaptive numbers of a new group, as plain numbers."""
    return {
        **GROUP_NUMBERS,
        "d": float(group["d0"]),
        "d_prev": float(group["d0"]),
        "effective_lr": float(group["lr"]),
        "k": 1,
        "skipped_steps": 0,
        "shared_d": None,
    }


def _hyper_row(group: Group) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    beta3 = beta2**0.5 if group["beta3"] is None else group["beta3"]
    numbers = {**group, "beta1": beta1, "beta2": beta2, "beta3": beta3, "eps": group["eps"] or 0.0}
    return tuple(float(numbers[name]) for name in _HYPER + _HYPER_SWITCHES)


class GroupNumbers:
    """The adaptive numbers of all groups as one tensor on the device, and their copies in ``param_groups``."""

    def __init__(self, groups: Sequence[Group], host: HostAccess) -> None:
        self._host = host
        self.published = [self._row(group) for group in groups]
        self.values = host.upload(self.published).t().contiguous()
        self._hyper_rows: list[tuple[float, ...]] = []
        self._hyper = torch.empty(0)
        self._in_flight: PendingCopy | None = None

    @staticmethod
    def _row(group: Group) -> list[float]:
        return [float(group[name] or 0.0) for name in GROUP_NUMBERS]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[list(GROUP_NUMBERS).index(name)]

    def absorb(self, groups: Sequence[Group]) -> None:
        """Take over what somebody wrote into ``param_groups`` since the last step (d, for instance)."""
        for column, group in enumerate(groups):
            row = self._row(group)
            if row == self.published[column]:
                continue
            for index, (now, before) in enumerate(zip(row, self.published[column], strict=True)):
                if now != before:
                    self.values[index, column] = now
            self.published[column] = row

    def hyper(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The groups' arguments as vectors over groups; copied to the device only when one has changed."""
        rows = [_hyper_row(group) for group in groups]
        if rows != self._hyper_rows:
            self._hyper_rows, self._hyper = rows, self._host.upload(rows).t().contiguous()
        return dict(zip(_HYPER + _HYPER_SWITCHES, self._hyper.unbind(), strict=True))

    def publish(self, groups: Sequence[Group], *, wait: bool) -> None:
        """Copy the numbers into ``param_groups``.

        Args:
            groups: the groups to write to.
            wait: write this step's numbers, waiting for the device if need be. Without it an accelerator's groups
                show the numbers of an earlier step, and nothing waits.
        """
        if self.values.is_meta:
            return
        if wait or self._host.free:
            self._in_flight = None
            self._write(groups, self.values.tolist())
            return
        if self._in_flight is not None:
            arrived = self._in_flight.take()
            if arrived is None:
                return
            self._write(groups, arrived.numpy().tolist())
        self._in_flight = self._host.start_copy(self.values)

    def _write(self, groups: Sequence[Group], table: list[list[float]]) -> None:
        for column, group in enumerate(groups):
            for (name, _), row in zip(GROUP_NUMBERS.items(), table, strict=True):
                value: float | int | None = row[column]
                if name in ("k", "skipped_steps"):
                    value = int(row[column])
                elif name == "shared_d" and value == 0:
                    value = None
                group[name] = value
            self.published[column] = self._row(group)


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
    statistics: Tensor
    focus_fixed: Tensor
    momentum_of_d: Tensor
    rounds_samples: Tensor
    rounds_s: Tensor
    identity: Tensor
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
        divides = [s.schedulefree and not s.atan2 and not s.focus and not (s.adopt and not s.quirks) for s in of_slot]
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
            statistics=flags([s.statistics for s in of_slot]),
            focus_fixed=flags([s.focus and not s.quirks for s in of_slot]),
            momentum_of_d=flags([not (s.adopt and not s.quirks) for s in of_slot]),
            rounds_samples=flags([rounds and s.quirks for rounds, s in zip(bf16, of_slot, strict=True)]),
            rounds_s=flags([rounds and s.quirks for rounds, s in zip(s_in_bf16, of_slot, strict=True)]),
            identity=torch.tensor([slot.identity for slot in table.slots], device=device),
            any_adopt=any(s.adopt for s in of_slot),
            any_orthograd=any(s.orthograd for s in of_slot),
            any_mask=any(s.counts_mask_early or s.counts_mask_late for s in of_slot),
            any_speed=any(s.speed for s in of_slot),
            any_random=any(rounds and s.stochastic_rounding for rounds, s in zip(bf16, of_slot, strict=True)),
        )


class StepNumbers:
    """The numbers of one step that belong to a group: what it starts with, and what its parts add up to."""

    def __init__(self, numbers: GroupNumbers, groups: Sequence[Group], seed: int) -> None:
        self._numbers, self._groups, self.seed = numbers, groups, seed
        h = self.hyper = numbers.hyper(groups)
        self.k, self.d = numbers["k"].clone(), numbers["d"].clone()
        shared = numbers["shared_d"]
        delta = torch.where(shared > 0, shared, self.d) * h["lr"]
        radam_beta2, rectification = second_moment.radam(self.k, h["beta2"])
        corrects = h["use_bias_correction"] > 0
        self.beta2 = torch.where(corrects, radam_beta2, h["beta2"])
        self.delta = torch.where(corrects, delta * rectification, delta)
        self.c, self.q, self._weight_sum = averaging.averaging_weight(
            self.delta, numbers["weight_sum"], h["beta1"], h["schedulefree_c"]
        )
        self.adapts = (h["prodigy_steps"] == 0) | (self.k < h["prodigy_steps"])
        self._numerator, self._denominator = torch.zeros_like(self.d), torch.zeros_like(self.d)
        self._moved = torch.zeros_like(self.d, dtype=torch.bool)
        self._ok = torch.ones((), dtype=torch.bool, device=self.d.device)

    def add(self, numerator: Tensor, denominator: Tensor, moved: Tensor, ok: Tensor) -> None:
        """Count a part of the step in: its sums and whether it moved anything, by group; whether all was finite."""
        self._numerator += numerator
        self._denominator += denominator
        self._moved |= moved
        self._ok &= ok

    def commit(self) -> None:
        """The numbers after the step: d and the sums behind it, the averaging weight, k. Nothing if not finite."""
        numbers, h, ok = self._numbers, self.hyper, self._ok
        pooled = not self._groups[0]["split_groups"]
        adapts = self.adapts[:1].expand_as(self.d) if pooled else self.adapts
        for name, value in vars(self._adapted(pooled)).items():
            self._put(name, value, adapts & ok)
        self._put("d_prev", self.d, adapts & ok)
        averages = h["use_schedulefree"] > 0
        self._put("weight_sum", self._weight_sum, self._moved & averages & ok)
        effective_lr = torch.where(averages, h["lr"] * self.q, h["lr"])
        self._put("effective_lr", effective_lr, (self._moved | ~averages) & ok)
        if self._groups[0]["split_groups"] and self._groups[0]["split_groups_mean"]:
            self._put("shared_d", step_size.harmonic_mean(numbers["d"]).expand_as(self.d), ok)
        numbers["k"].add_(ok)
        numbers["skipped_steps"].add_(~ok)

    def _adapted(self, pooled: bool) -> StepSize:
        """The step size after the step; with one for all groups, group 0's arguments and the sums of all."""
        numbers, h = self._numbers, self.hyper
        numerator, denominator = self._numerator, self._denominator
        if pooled:
            numerator, denominator = (x.sum().expand_as(x) for x in (numerator, denominator))
        history = (numbers[n] for n in ("d_numerator", "d_denom", "prev_d_numerator", "max_d_numerator"))
        rule = StepSizeRule(
            beta3=h["beta3"],
            d0=h["d0"],
            d_coef=h["d_coef"],
            d_limiter=h["d_limiter"] > 0,
            use_speed=h["use_speed"] > 0,
            quirks=self._groups[0]["reference_quirks"],
        )
        new = step_size.adapted(StepSize(self.d, *history), numerator, denominator, rule)
        return StepSize(*(value[:1].expand_as(value) for value in vars(new).values())) if pooled else new

    def _put(self, name: str, value: Tensor, where: Tensor) -> None:
        old = self._numbers[name]
        old.copy_(torch.where(where, value, old))


class PartNumbers:
    """The numbers of one step that belong to the parameters of one part, in the order in which the step needs them."""

    def __init__(self, step: StepNumbers, parameters: Tensor, traits: Traits) -> None:
        self._step, self._parameters, self._traits = step, parameters, traits
        self._updates = parameters[PARAMETER_NUMBERS.index("step")]
        self.coefficients = self._coefficients()
        self.keys = traits.identity
        if traits.any_random:
            self.keys = rounding.keys(step.seed, self._updates.long(), traits.identity)

    def _coefficients(self) -> Tensor:
        """The table of :class:`Coefficients`, fp32."""
        step, h, t, of = self._step, self._step.hyper, self._traits, self._traits.group_of
        d, delta, beta1 = step.d[of], step.delta[of], h["beta1"][of]
        # ADOPT's first step, of the group or of a parameter that comes late, only sets the second moment.
        self._adopt_first = t.adopt & ((step.k[of] == 1) | (self._updates == 0))
        beta2 = torch.where(self._adopt_first, 0.0, step.beta2[of])
        one = torch.ones_like(d)
        decay = h["weight_decay"][of]
        rows = Coefficients(
            d=d,
            d_eps=d * h["eps"][of],
            beta1=beta1,
            momentum_weight=(1 - beta1) * torch.where(t.momentum_of_d, d, one),
            beta2=beta2,
            square_weight=(1 - beta2) * torch.where(t.focus_fixed, one, d * d),
            focus_correction=torch.where(t.focus_fixed, 1 / (1 - beta2 ** (self._updates + 1)), one),
            clamp=step.k[of] ** 0.25,
            delta=delta,
            c=step.c[of],
            q=step.q[of],
            weight_decay=decay,
            keep=1 - decay * torch.where(h["weight_decay_by_lr"][of] > 0, delta, one),
            beta3=h["beta3"][of],
            s_weight=step_size.prodigy_weight(step.d, h["d0"])[of],
        )
        return torch.stack(rows).float()

    def moments(self, moments: FactoredMoments, sums: Tensor) -> Tensor:
        """The factored moments after this step, in scratch, from the sums of all ranks."""
        named = Coefficients(*self.coefficients.unbind())
        return moments.updated(sums, named.beta2, named.square_weight)

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
        factor = torch.where(t.gain_is_d, self.coefficients[0].double(), one)
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

    def gates(self, stats: Tensor, host: HostAccess) -> Gates:
        """What is written: nothing if any sum is not finite, and only parameters that have a gradient."""
        # ADOPT's first step divides by an empty moment: its direction does not count.
        uu = torch.where(self._adopt_first, torch.zeros_like(stats[:, 0]), stats[:, Stat.UU])
        self._ok = stats[:, : Stat.UU].isfinite().all() & uu.isfinite().all()
        self._active = stats[:, Stat.PRESENT] > 0
        moments = self._active & self._ok
        weights = moments & ~self._adopt_first
        known = torch.stack((moments, weights)).tolist() if host.free else None
        return Gates(moments, weights, known)

    def commit(self, stats: Tensor, gates: Gates) -> None:
        """Count this part in the step, and advance what belongs to its parameters."""
        t, step = self._traits, self._step
        moved = self._active & ~self._adopt_first
        counted = moved & t.statistics & step.adapts[t.group_of]
        numerator, denominator = self._contributions(stats, counted, gates)
        by_group = ((t.membership * x).sum(1) for x in (numerator, denominator, moved.double()))
        group_numerator, group_denominator, group_moved = by_group
        step.add(group_numerator, group_denominator, group_moved > 0, self._ok)
        self._updates.add_(gates.moments)

    def _contributions(self, stats: Tensor, counted: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
        """Each parameter's share in the numerator and denominator of its group."""
        t, h = self._traits, self._step.hyper
        weight = step_size.prodigy_weight(self._step.d, h["d0"])[t.group_of]

        def as_stored(sums: Tensor, rounds: Tensor) -> Tensor:
            return torch.where(rounds, sums.bfloat16().double(), sums)

        zero = torch.zeros_like(stats[:, Stat.DOT])
        dot = as_stored(stats[:, Stat.DOT], t.rounds_samples)
        numerator, denominator = weight * dot, as_stored(stats[:, Stat.S_L1], t.rounds_s)
        if t.any_speed:
            speed = (h["use_speed"] > 0)[t.group_of]
            state, speed_numerator, speed_denominator = step_size.speed_contribution(
                SpeedState(*self._parameters[1:]),
                dot,
                as_stored(stats[:, Stat.DELTA_L1], t.rounds_samples),
                as_stored(stats[:, Stat.DELTA_SQUARE].sqrt(), t.rounds_samples),
                self._step.k[t.group_of],
                weight,
            )
            remembers = counted & speed & gates.weights
            for row, value in zip(self._parameters[1:], vars(state).values(), strict=True):
                row.copy_(torch.where(remembers, value, row))
            numerator = torch.where(speed, speed_numerator, numerator)
            denominator = torch.where(speed, speed_denominator, denominator)
        return torch.where(counted, numerator, zero), torch.where(counted, denominator, zero)
