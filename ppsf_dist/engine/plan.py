"""Everything about a set of shards that does not change from step to step, prepared once."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import compress, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.algorithm.second_moment import factoring
from ppsf_dist.engine.fast_numbers import NumbersOfParameters
from ppsf_dist.engine.host import HostAccess, PendingCopy
from ppsf_dist.engine.part_numbers import Traits
from ppsf_dist.engine.reductions import Outcome, Reductions, portions_of
from ppsf_dist.kernels.choice import ChosenKernels, ChosenPasses
from ppsf_dist.kernels.interface import Buffers, Coefficients, Gates, Scales
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.refusals import refuse_gradient, refuse_quantized, refuse_reshaped, refuse_weights
from ppsf_dist.sharding import Shard, Team
from ppsf_dist.sharding.slots import SlotTable
from ppsf_dist.state.inventory import PARAMETER_NUMBERS, SAMPLED, Entry, Holds, Lies, needed, numbers_of
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.samples import sample_count, samples_of

logger = logging.getLogger(__name__)

State = dict[Tensor, dict[str, Any]]

STARTS_ANYWHERE = ("z", "exp_avg")
"""State that may begin in mid-run: an average where the weights are then, momentum at zero. Without the switch that
asks for it it is dropped, so that it never goes on from something stale."""

_WHY = {
    Holds.POINT: "d compares where a run is with where it began",
    Holds.SUM: "d is a ratio of two sums, and only one of them would start at zero",
    Holds.SQUARES: "steps would be divided by a mean that starts at zero",
}


class Plan:
    """Shards, their slots, the flat buffers, and what the kernels have prepared for them.

    Building one creates state where it is missing and compares parameters and arguments between ranks; both wait.

    Args:
        kernels: what computes the passes.
        coefficients: names of the numbers that they scale with.
        shards: the local shards of all trainable parameters, in the order of ``param_groups``.
        groups_of: the group of each shard.
        table: the logical parameters as all ranks have agreed on them.
        switches: of each group.
        frozen: whether the step size of a group no longer adapts.
        team: the ranks that share sums.
        host: what the host may read when.
        state: the optimizer's state, completed in place.
        signature: what this plan was built from.

    Raises:
        ValueError: weights have a dtype that is not allowed.
    """

    def __init__(
        self,
        kernels: ChosenKernels,
        coefficients: Sequence[str],
        shards: Sequence[Shard],
        groups_of: Sequence[int],
        table: SlotTable,
        switches: Sequence[Switches],
        frozen: Sequence[bool],
        team: Team,
        host: HostAccess,
        state: State,
        signature: Hashable,
    ) -> None:
        self._kernels = kernels
        self.signature, self.team, self.host, self.shards = signature, team, host, list(shards)
        self.slots, self.slot_of_shard, self.frozen = table.slots, table.of_shard, list(frozen)
        self._groups_of, self._switches = list(groups_of), list(switches)
        for slot in table.slots:
            refuse_weights(getattr(torch, slot.dtype.removeprefix("torch.")), slot)
        for shard, index in zip(shards, self.slot_of_shard, strict=True):
            refuse_quantized(shard.weights(), table.slots[index])
        device = shards[0].weights().device
        factored = []
        for slot in table.slots:
            switch = switches[slot.group]
            axes = factoring(slot.shape) if switch.second_moment and switch.factored else None
            dtype = torch.float32 if switch.factored_fp32 else getattr(torch, slot.dtype.removeprefix("torch."))
            factored.append(None if axes is None else (axes, switch.quirks, dtype))
        self.moments = FactoredMoments(factored, device)
        self.parameters = torch.zeros(len(PARAMETER_NUMBERS), len(table.slots), dtype=torch.float64, device=device)
        self.traits = Traits.of(table, switches, device)
        self._state = state
        for shard, index, group in zip(shards, self.slot_of_shard, groups_of, strict=True):
            self._complete_state(shard, index, switches[group], state[shard.param])
        self._first = self._a_state_tensor()
        self._unseen = [
            (shard, slot)
            for shard, slot in zip(shards, self.slot_of_shard, strict=True)
            if not state[shard.param]["step"]
        ]
        self._shapes = [shard.weights().shape for shard in shards]
        self._params = [shard.param for shard in shards]
        self._are_whole = all(type(shard) is Shard for shard in shards)
        # Those whose gradient may have to be summed first.
        self._summed = [shard for shard in shards if type(shard).summand is not Shard.summand]
        self._named: set[Tensor] = set()
        self._search: PendingCopy | None = None
        self._known_present: list[bool] = []
        self._present = torch.zeros(len(table.slots), dtype=torch.float64, device=device)
        self.reduces_sums_early = any(
            f is not None and not switches[s.group].adopt for f, s in zip(factored, table.slots, strict=True)
        )
        self.needs_norms = any(switches[s.group].needs_norms for s in table.slots)
        masks_late = any(switches[s.group].counts_mask_late for s in table.slots)
        # Whether the denominator is read before the last sum.
        self.divides_early = self.needs_norms or masks_late
        # Whether nothing rides with the sums of g^2, so that they may go ahead.
        self.sums_travel_alone = self.reduces_sums_early and self.needs_norms
        self._portions = self._begins() if self.sums_travel_alone and not team.is_alone else [0]
        self.reductions = Reductions(
            team,
            len(table.slots),
            self._lengths(),
            device,
            sums_early=self.reduces_sums_early,
            needs_norms=self.needs_norms,
            masks_late=masks_late,
        )
        self.buffers = self._make_buffers(coefficients)
        self.numbers = NumbersOfParameters(self.parameters, self.traits, self.buffers, self.reductions)
        self.passes = self._prepare(frozen)

    def _sums_of(self, slot: int) -> int:
        placed = self.moments.placed[slot]
        return 0 if placed is None else placed.col.stop - placed.row.start

    def _begins(self) -> list[int]:
        """The first slot of each portion of pass 1."""
        sizes = [math.prod(slot.shape) for slot in self.slots]
        return portions_of(sizes, [self._sums_of(slot) for slot in range(len(self.slots))])

    def _lengths(self) -> list[int]:
        """How many sums of g^2 each portion has."""
        return [
            sum(map(self._sums_of, range(first, end))) for first, end in pairwise((*self._portions, len(self.slots)))
        ]

    def _make_buffers(self, coefficients: Sequence[str]) -> Buffers:
        device, slots, masks = self.parameters.device, len(self.slots), self.reductions.masks

        def flags() -> Tensor:
            return torch.zeros(slots, dtype=torch.bool, device=device)

        return Buffers(
            coefficients=Coefficients(coefficients, slots, device),
            factors=torch.zeros_like(self.moments.values),
            new_moments=torch.zeros_like(self.moments.values),
            adopt=self.traits.adopt if self.traits.any_adopt else None,
            scales=torch.zeros(len(Scales._fields), slots, dtype=torch.float32, device=device),
            keys=torch.zeros(slots, dtype=torch.int32, device=device),
            gates=Gates(flags(), flags()),
            sums=self.reductions.sums,
            stats=self.reductions.table.stats,
            masks=None if masks is None else masks.stats,
        )

    def _complete_state(self, shard: Shard, slot: int, switches: Switches, state: dict[str, Any]) -> None:
        """Add the state that a parameter lacks, and move its factored moments into the flat buffer."""
        switches_now = self._as_frozen(switches, self.slots[slot].group)
        for entry in needed(switches_now, self.slots[slot].shape):
            if entry.name not in state:
                if state.get("step") and entry.name not in STARTS_ANYWHERE:
                    raise ValueError(
                        f"{self.slots[slot]} has been stepped without {entry.name!r}, which its group's switches now "
                        f"ask for and which cannot begin in mid-run ({_WHY[entry.holds]}): set back what has changed "
                        "(factored, use_focus, use_speed, prodigy_steps, ...), or build a new optimizer on the "
                        "averaged weights, with d0= the d that was found"
                    )
                state[entry.name] = _initial(entry, shard, switches_now)
        if not switches_now.statistics:
            for name in SAMPLED:
                state.pop(name, None)
        placed = self.moments.placed[slot]
        if placed is not None:
            axes = placed.factoring
            for name, where, shape in (
                ("exp_avg_sq_row", placed.row, axes.row_shape),
                ("exp_avg_sq_col", placed.col, axes.col_shape),
            ):
                view = self.moments.values[where].view(shape)
                view.copy_(state[name])
                state[name] = view
        for row, name in zip(self.parameters, numbers_of(switches), strict=False):
            value = state.setdefault(name, 0.0)
            if value:
                row[slot] = value

    def _prepare(self, frozen: Sequence[bool]) -> ChosenPasses:
        self.frozen = list(frozen)
        switch_of = [self._as_frozen(self._switches[group], group) for group in self._groups_of]
        return self._kernels.prepare(
            self.shards, self.slot_of_shard, switch_of, self.moments, self._state, self.buffers, self._portions
        )

    def _as_frozen(self, switches: Switches, group: int) -> Switches:
        """Switches of a group, without statistics once its step size no longer adapts."""
        return replace(switches, statistics=switches.statistics and not self.frozen[group])

    def freeze(self, frozen: Sequence[bool]) -> None:
        """Free p0 and s of groups whose step size no longer adapts, when this rank learns of it.

        Ranks may learn of it in different steps: the device has gated their sums out, so nothing else depends on it.
        """
        for shard, group in zip(self.shards, self._groups_of, strict=True):
            if frozen[group]:
                for name in SAMPLED:
                    self._state[shard.param].pop(name, None)
        self.passes = self._prepare(frozen)

    def drop_unneeded(self) -> None:
        """Free an average or a momentum that the switches no longer ask for, once all ranks plan so."""
        for shard, slot in zip(self.shards, self.slot_of_shard, strict=True):
            place = self.slots[slot]
            names = {entry.name for entry in needed(self._switches[place.group], place.shape)}
            dropped = set(STARTS_ANYWHERE) - names
            for name in (*dropped, *(("y",) if "z" in dropped else ())):
                self._state[shard.param].pop(name, None)
        self._first = self._a_state_tensor()

    def is_current(self) -> bool:
        """Whether the state still holds the tensors that the work looks at. Offloading it and back replaces them."""
        return self._first is self._a_state_tensor()

    def _a_state_tensor(self) -> Tensor | None:
        entry = self._state[self.shards[0].param]
        return next((entry[name] for name in ("z", "exp_avg", "exp_avg_sq") if name in entry), None)

    def why_not_captured(self) -> str | None:
        """Why a step of it cannot be launched again as it was, while gradients move; None if it can."""
        if self.passes.backends != {"triton"}:
            uses = "; ".join(map(str, self.passes.uses))
            return f"only Triton's kernels follow gradients that move, and here it is {uses}: set PPSF_KERNELS=native"
        if any(shard.summand() is not None for shard in self._summed):
            return "gradients come as sums over ranks (Partial), which are completed before the step: redistribute them"
        return None

    def capture_unseen(self) -> None:
        """Let parameters that have not had a gradient yet start from where they are now."""
        if not self._unseen:
            return
        steps = self.parameters[0]
        if self.host.free:
            known = steps.tolist()
            self._unseen = [(shard, slot) for shard, slot in self._unseen if not known[slot]]
        for shard, slot in self._unseen:
            slice_p = self._switches[self.slots[slot].group].slice_p
            state, weights, seen = self._state[shard.param], shard.weights(), steps[slot] > 0
            if "z" in state:
                state["z"].copy_(torch.where(seen, state["z"], weights))
            if "p0" in state:
                now = samples_of(shard, weights, slice_p).to(state["p0"].dtype)
                state["p0"].copy_(torch.where(seen, state["p0"], now))
        if not self.host.free:
            self._unseen = [(s, slot) for s, slot in self._unseen if s.gradient() is None]

    def begin(self, unsound: Tensor) -> None:
        """Empty the buffers of the step, and note which gradients are here and how many numbers are not finite."""
        self.reductions.begin()
        if not self.host.captures:
            self._complete_gradients()
            self.bind()
        self.reductions.table.stats[:, Stat.PRESENT] = self._present
        self.reductions.last.outcome[Outcome.UNSOUND] = unsound

    def bind(self) -> None:
        """Look at the weights and gradients of this step: what the host does for it.

        Raises:
            ValueError: they do not lie as the plan was made for.
        """
        weights, gradients = self._local_tensors()
        shapes = self._shapes
        if [here.shape for here in weights] != shapes:
            for here, slot, shape in zip(weights, self.slot_of_shard, shapes, strict=True):
                refuse_reshaped(here.shape, shape, self.slots[slot])
        present = [gradient is not None for gradient in gradients]
        here_now = [gradient for gradient in gradients if gradient is not None]
        if not _lie_like(here_now, list(compress(shapes, present))):
            for gradient, slot, shape in zip(gradients, self.slot_of_shard, shapes, strict=True):
                if gradient is not None and not _lie_like([gradient], [shape]):
                    refuse_gradient(gradient, shape, self.slots[slot])
        self.passes.bind(weights, gradients)
        if present != self._known_present:
            column = [0.0] * len(self.slots)
            for slot, is_here in zip(self.slot_of_shard, present, strict=True):
                column[slot] = float(is_here)
            self._present.copy_(self.host.upload([column])[0])
            self._known_present = present

    def _local_tensors(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and gradient of each shard as they are now."""
        if self._are_whole:
            # Asked for in every step.
            return self._params, [param.grad for param in self._params]
        return [shard.weights() for shard in self.shards], [shard.gradient() for shard in self.shards]

    def end(self) -> None:
        """Let go of what belongs to the step."""
        self.passes.release()
        for shard in self._summed:
            shard.completed = None

    def _complete_gradients(self) -> None:
        """Sum the gradients that ranks hold in parts, all of a group in one all-reduce."""
        parts: dict[dist.ProcessGroup, list[tuple[Shard, Tensor]]] = {}
        for shard in self._summed:
            summand = shard.summand()
            if summand is not None:
                shard.completed = summand[1].clone()
                parts.setdefault(summand[0], []).append((shard, shard.completed))
        for group, of_group in parts.items():
            Team(group).sum_(*[tensor for _, tensor in of_group])

    def count_unsound_weights(self) -> Tensor:
        """How many of this rank's parameters have weights that are not finite; says which. Waits for the device."""
        sound = self._soundness()
        self._name_unsound(sound.tolist())
        return (~sound).sum().double()

    def search_unsound_weights(self, *, begin: bool) -> None:
        """Say which weights are not finite, in a later call than the one that begins to look. Does not wait."""
        if self._search is not None:
            arrived = self._search.take()
            if arrived is not None:
                self._search = None
                self._name_unsound(arrived.tolist())
        elif begin:
            self._search = self.host.start_copy(self._soundness())

    def _soundness(self) -> Tensor:
        return torch.stack([shard.weights().isfinite().all() for shard in self.shards])

    def _name_unsound(self, sound: list[bool]) -> None:
        for shard, slot, is_sound in zip(self.shards, self.slot_of_shard, sound, strict=True):
            if not is_sound and shard.param not in self._named:
                self._named.add(shard.param)
                logger.warning("the weights of %s are not finite: steps change nothing", self.slots[slot])

    def settle(self) -> None:
        """Bring the numbers of each parameter into its state, as plain numbers. Waits for the device."""
        if self.parameters.is_meta:
            return
        table = self.parameters.tolist()
        for shard, slot in zip(self.shards, self.slot_of_shard, strict=True):
            for name, row in zip(numbers_of(self._switches[self.slots[slot].group]), table, strict=False):
                self._state[shard.param][name] = row[slot]


def _lie_like(gradients: list[Tensor], shapes: list[torch.Size]) -> bool:
    """Whether all are dense and real, and have these shapes. Asked for in every step: no call for each of them."""
    return (
        [gradient.shape for gradient in gradients] == shapes
        and {gradient.layout for gradient in gradients} <= {torch.strided}
        and not any(dtype.is_complex for dtype in {gradient.dtype for gradient in gradients})
    )


def _initial(entry: Entry, shard: Shard, switches: Switches) -> Tensor:
    """A piece of state before the first step: a point is where the weights are, all else is zero."""
    weights = shard.weights()
    dtype = entry.dtype(weights.dtype, switches)
    if entry.lies is Lies.REPLICATED:
        axes = factoring(shard.shape)
        assert axes is not None
        shape = axes.row_shape if entry.name == "exp_avg_sq_row" else axes.col_shape
        return torch.zeros(shape, dtype=dtype, device=weights.device)
    if entry.lies is Lies.SAMPLED:
        if entry.holds is Holds.POINT:
            return samples_of(shard, weights, switches.slice_p).to(dtype)
        return torch.zeros(sample_count(shard, switches.slice_p), dtype=dtype, device=weights.device)
    if entry.holds is Holds.POINT:
        return weights.detach().clone()
    return torch.zeros_like(weights)
