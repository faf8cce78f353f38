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

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self.device = device
        self.published = [self._row(group) for group in groups]
        self.values = torch.tensor(self.published, dtype=torch.float64).t().contiguous().to(device)
        self._hyper_rows: list[tuple[float, ...]] = []
        self._hyper = torch.empty(0)
        self._in_flight: tuple[Tensor, torch.cuda.Event] | None = None

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
            host = torch.tensor(rows, dtype=torch.float64).t().contiguous()
            if self.device.type == "cuda":
                host = host.pin_memory()
            self._hyper_rows, self._hyper = rows, host.to(self.device, non_blocking=True)
        return dict(zip(_HYPER + _HYPER_SWITCHES, self._hyper.unbind(), strict=True))

    def publish(self, groups: Sequence[Group], *, wait: bool) -> None:
        """Copy the numbers into ``param_groups``.

        Args:
            groups: the groups to write to.
            wait: write this step's numbers, waiting for the device if need be. Without it an accelerator's groups
                show the numbers of an earlier step, and nothing waits.
        """
        if wait or self.device.type != "cuda":
            self._in_flight = None
            self._write(groups, self.values.tolist())
            return
        if self._in_flight is not None:
            host, event = self._in_flight
            if not event.query():  # type: ignore[no-untyped-call]
                return
            self._write(groups, host.tolist())
        host = torch.empty(self.values.shape, dtype=torch.float64, pin_memory=True)
        host.copy_(self.values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._in_flight = (host, event)

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
    """What never changes about the parameters of a plan, as vectors over slots on the device."""

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
    any_adopt: bool

    @classmethod
    def of(cls, table: SlotTable, switches: Sequence[Switches], device: torch.device) -> Traits:
        """Read them off the slots and the switches of their groups."""

        def flags(values: Sequence[bool]) -> Tensor:
            return torch.tensor(values, dtype=torch.bool, device=device)

        of_slot = [switches[slot.group] for slot in table.slots]
        low = [slot.dtype in ("torch.bfloat16", "torch.float16") for slot in table.slots]
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
            rounds_samples=flags([bits and s.quirks for bits, s in zip(low, of_slot, strict=True)]),
            rounds_s=flags([s.quirks for s in of_slot]),
            any_adopt=any(s.adopt for s in of_slot),
        )


class StepNumbers:
    """All numbers of one step, in the order in which the step needs them."""

    def __init__(
        self, numbers: GroupNumbers, parameters: Tensor, traits: Traits, groups: Sequence[Group], seed: int
    ) -> None:
        self._numbers, self._parameters, self._traits, self._groups = numbers, parameters, traits, groups
        h = self._h = numbers.hyper(groups)
        self._k, self._d = numbers["k"].clone(), numbers["d"].clone()
        shared = numbers["shared_d"]
        delta = torch.where(shared > 0, shared, self._d) * h["lr"]
        radam_beta2, rectification = second_moment.radam(self._k, h["beta2"])
        corrects = h["use_bias_correction"] > 0
        beta2 = torch.where(corrects, radam_beta2, h["beta2"])
        self._delta = torch.where(corrects, delta * rectification, delta)
        self._c, self._q, self._weight_sum = averaging.averaging_weight(
            self._delta, numbers["weight_sum"], h["beta1"], h["schedulefree_c"]
        )
        self._steps = parameters[PARAMETER_NUMBERS.index("step")]
        self.coefficients = self._coefficients(beta2)
        index = torch.arange(len(self._steps), device=numbers.device)
        self.keys = rounding.keys(seed, self._steps.long(), index)

    def _coefficients(self, beta2: Tensor) -> Tensor:
        """The table of :class:`Coefficients`, fp32."""
        h, t, of = self._h, self._traits, self._traits.group_of
        d, delta, beta1 = self._d[of], self._delta[of], h["beta1"][of]
        # ADOPT's first step, of the group or of a parameter that comes late, only sets the second moment.
        self._adopt_first = t.adopt & ((self._k[of] == 1) | (self._steps == 0))
        beta2_of = torch.where(self._adopt_first, 0.0, beta2[of])
        age = self._steps + 1
        square_weight = (1 - beta2_of) * torch.where(t.focus_fixed, torch.ones_like(d), d * d)
        correction = torch.where(t.focus_fixed, 1 / (1 - beta2_of**age), torch.ones_like(d))
        decay = h["weight_decay"][of]
        rows = Coefficients(
            d=d,
            d_eps=d * h["eps"][of],
            beta1=beta1,
            momentum_weight=(1 - beta1) * torch.where(t.momentum_of_d, d, torch.ones_like(d)),
            beta2=beta2_of,
            square_weight=square_weight,
            focus_correction=correction,
            clamp=self._k[of] ** 0.25,
            delta=delta,
            c=self._c[of],
            q=self._q[of],
            weight_decay=decay,
            keep=1 - decay * torch.where(h["weight_decay_by_lr"][of] > 0, delta, torch.ones_like(delta)),
            beta3=h["beta3"][of],
            s_weight=step_size.prodigy_weight(self._d, h["d0"])[of],
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
        gain = torch.where(t.gain_is_d, self.coefficients[0].double(), one)
        mask = torch.where(t.early_mask, direction.mask_scale(stats[:, Stat.EARLY_MASK], t.numel), one)
        factor = gain * mask
        uu = stats[:, Stat.UU] * factor * factor
        keep, pull = direction.orthogonal_scales(uu, stats[:, Stat.WW], stats[:, Stat.WU] * factor, t.numel)
        keep, pull = torch.where(t.orthograd, keep, one), torch.where(t.orthograd, pull, torch.zeros_like(one))
        rms = torch.where(t.stableadamw, direction.soft_rms_scale(uu, t.numel), one)
        late = torch.where(t.late_mask, direction.mask_scale(stats[:, Stat.LATE_MASK], t.numel), one)
        amount = rms * keep * factor
        rows = Scales(amount=amount, pull=rms * pull, mask=late, advance=amount * self._delta[t.group_of])
        return torch.stack(rows).float()

    def gates(self, stats: Tensor) -> Gates:
        """What is written: nothing if any sum is not finite, and only parameters that have a gradient."""
        self._ok = self._finite(stats)
        self._active = stats[:, Stat.PRESENT] > 0
        moments = self._active & self._ok
        weights = moments & ~self._adopt_first
        known = (moments.tolist(), weights.tolist()) if moments.device.type == "cpu" else None
        return Gates(moments, weights, known)

    def _finite(self, stats: Tensor) -> Tensor:
        """Whether all sums are finite. ADOPT's first step divides by an empty moment: its direction does not count."""
        direction_free = torch.where(self._adopt_first, torch.zeros_like(stats[:, 0]), stats[:, Stat.UU])
        return stats[:, : Stat.UU].isfinite().all() & direction_free.isfinite().all()

    def commit(self, stats: Tensor, gates: Gates) -> None:
        """The numbers after the step: d, the sums behind it, the averaging weight, k, and SPEED's memory."""
        numbers, h, t = self._numbers, self._h, self._traits
        of, ok = t.group_of, self._ok
        moved = self._active & ~self._adopt_first
        steps_limit = h["prodigy_steps"]
        adapts = (steps_limit == 0) | (self._k < steps_limit)
        weight = step_size.prodigy_weight(self._d, h["d0"])
        counted = moved & t.statistics & adapts[of]
        numerator, denominator = self._contributions(stats, weight[of], counted, gates)

        group_numerator = (t.membership * numerator).sum(1)
        group_denominator = (t.membership * denominator).sum(1)
        pooled = not self._groups[0]["split_groups"]
        if pooled:
            group_numerator, group_denominator = group_numerator.sum().expand(len(h["d0"])), group_denominator.sum()
            group_denominator = group_denominator.expand(len(h["d0"]))
        old = StepSize(
            self._d, *(numbers[n] for n in ("d_numerator", "d_denom", "prev_d_numerator", "max_d_numerator"))
        )
        rule = StepSizeRule(
            beta3=h["beta3"],
            d0=h["d0"],
            d_coef=h["d_coef"],
            d_limiter=h["d_limiter"] > 0,
            use_speed=h["use_speed"] > 0,
            quirks=self._groups[0]["reference_quirks"],
        )
        new = step_size.adapted(old, group_numerator, group_denominator, rule)
        if pooled:
            new = StepSize(*(v[:1].expand(len(v)) for v in vars(new).values()))
            adapts = adapts[:1].expand(len(adapts))

        group_moved = (t.membership * moved.double()).sum(1) > 0
        averages = group_moved & (h["use_schedulefree"] > 0)
        write = adapts & ok
        for name, value in vars(new).items():
            self._put(name, value, write)
        self._put("d_prev", self._d, write)
        self._put("weight_sum", self._weight_sum, averages & ok)
        self._put(
            "effective_lr",
            torch.where(h["use_schedulefree"] > 0, h["lr"] * self._q, h["lr"]),
            ok & (averages | (h["use_schedulefree"] == 0)),
        )
        if self._groups[0]["split_groups"] and self._groups[0]["split_groups_mean"]:
            self._put("shared_d", step_size.harmonic_mean(numbers["d"]).expand_as(self._d), ok)
        numbers["k"].add_(ok)
        numbers["skipped_steps"].add_(~ok)
        self._steps.add_(gates.moments)

    def _put(self, name: str, value: Tensor, where: Tensor) -> None:
        old = self._numbers[name]
        old.copy_(torch.where(where, value, old))

    def _contributions(self, stats: Tensor, weight: Tensor, counted: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
        """Each parameter's share in the numerator and denominator of its group."""
        t = self._traits
        speed = (self._h["use_speed"] > 0)[t.group_of]

        def as_stored(sums: Tensor, rounds: Tensor) -> Tensor:
            return torch.where(rounds, sums.bfloat16().double(), sums)

        dot = as_stored(stats[:, Stat.DOT], t.rounds_samples)
        prodigy_denominator = as_stored(stats[:, Stat.S_L1], t.rounds_s)
        old = SpeedState(*self._parameters[1:])
        state, speed_numerator, speed_denominator = step_size.speed_contribution(
            old,
            old.max_x0_minus_l1_norm == 0,
            dot,
            as_stored(stats[:, Stat.DELTA_L1], t.rounds_samples),
            as_stored(stats[:, Stat.DELTA_SQUARE].sqrt(), t.rounds_samples),
            self._k[t.group_of],
            weight,
        )
        remembers = counted & speed & gates.weights
        for row, value in zip(self._parameters[1:], vars(state).values(), strict=True):
            row.copy_(torch.where(remembers, value, row))
        zero = torch.zeros_like(dot)
        numerator = torch.where(counted, torch.where(speed, speed_numerator, weight * dot), zero)
        denominator = torch.where(counted, torch.where(speed, speed_denominator, prodigy_denominator), zero)
        return numerator, denominator
