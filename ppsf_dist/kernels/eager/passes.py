"""The passes in plain PyTorch: readable, exact, on any device. The reference for every other backend.

All arithmetic is fp32 on tiles of shape ``(pieces, *size)``. Scalars come as tensors and stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.algorithm import direction, rounding, step_size
from ppsf_dist.kernels.eager.tile import TileView
from ppsf_dist.kernels.eager.work import Work, plan_work
from ppsf_dist.kernels.eager.workspace import Workspace
from ppsf_dist.kernels.interface import Buffers, KnownGates, Scales
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Shard
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.writes import Write, Writes


class EagerKernels:
    """Implements ``ppsf_dist.kernels.interface.Kernels``."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def prepare(
        self,
        shards: Sequence[Shard],
        slots: Sequence[int],
        switches: Sequence[Switches],
        moments: FactoredMoments,
        state: Mapping[Tensor, Mapping[str, Any]],
        buffers: Buffers,
    ) -> EagerPasses:
        return EagerPasses(self._workspace, plan_work(shards, slots, switches, moments, state), moments, buffers)


class EagerPasses:
    """Implements ``ppsf_dist.kernels.interface.Passes``, work by work and tile by tile."""

    def __init__(self, workspace: Workspace, works: Sequence[Work], moments: FactoredMoments, buffers: Buffers) -> None:
        self._workspace, self.works, self._moments, self._buffers = workspace, works, moments, buffers
        # Views of a table that stays where it is.
        self._of_one: dict[int, SimpleNamespace] = {}
        self._views: dict[int, list[TileView]] = {}

    @property
    def kept(self) -> int:
        return 0

    def fits(self, weights: Sequence[Tensor]) -> bool:
        return True

    def bind(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self._views = {}
        for work in self.works:
            work.bind(weights, gradients)

    def release(self) -> None:
        self._views = {}
        for work in self.works:
            work.release()

    def pass_1(self, *, goes_on: bool) -> None:
        for work in self.works:
            with self._sums(work, self._buffers.stats) as of_work:
                if work.owned:
                    self._sum_squares(work, of_work)
                else:
                    # A replica's part in the sums: 0, unless its gradient is not finite.
                    for view in self._tiles(work, factored=False):
                        of_work[Stat.LARGEST_SQUARE].add_(_largest(self._square(view)) * 0)

    def _sum_squares(self, work: Work, of_work: Sequence[Tensor]) -> None:
        switches = work.switches
        row_sums = None if work.row_index is None else torch.zeros_like(work.row_index, dtype=torch.float32)
        col_sums = None if work.col_index is None else torch.zeros_like(work.col_index, dtype=torch.float32)
        for view in self._tiles(work, factored=switches.adopt):
            square = self._square(view)
            if row_sums is not None and col_sums is not None and work.row_axis is not None:
                assert work.col_axis is not None
                view.tile.cut_axes(row_sums).add_(square.sum(work.row_axis + 1, keepdim=True))
                view.tile.cut_axes(col_sums).add_(square.sum(work.col_axis + 1, keepdim=True))
            else:
                of_work[Stat.LARGEST_SQUARE].add_(_largest(square))
                of_work[Stat.GG].add_(_sum_positive(square))
            if switches.statistics:
                self._sample_sums(view, of_work)
            if switches.counts_mask_early:
                of_work[Stat.EARLY_MASK].add_(_sum(direction.aligned(view.g, view.momentum())))
        if row_sums is not None and col_sums is not None:
            assert work.row_index is not None and work.col_index is not None
            sums = self._buffers.sums
            sums.index_add_(0, work.row_index.view(-1), row_sums.view(-1))
            sums.index_add_(0, work.col_index.view(-1), col_sums.view(-1))
            of_work[Stat.LARGEST_SQUARE].add_(_largest(row_sums))
            of_work[Stat.GG].add_(_sum(row_sums))

    def _square(self, view: TileView) -> Tensor:
        return torch.mul(view.g, view.g, out=self._workspace.take("u", view.g, view.shape))

    def update_moments(self) -> None:
        buffers, c = self._buffers, self._buffers.coefficients
        if len(self._moments):
            buffers.new_moments.copy_(self._moments.updated(buffers.sums, c["beta2"], c["square_weight"]))

    def fill_factors(self) -> None:
        buffers, of = self._buffers, self._buffers.new_moments
        if not len(self._moments):
            return
        if buffers.adopt is not None:
            of = torch.where(buffers.adopt[self._moments.slot_of], self._moments.values, of)
        buffers.factors.copy_(self._moments.factors(of))

    def pass_2(self) -> None:
        for work in self.works:
            if not (work.owned and work.switches.needs_norms):
                continue
            with self._sums(work, self._buffers.stats) as of_work:
                for view in self._tiles(work):
                    u = view.direction()[0]
                    if work.switches.orthograd:
                        # fp64: the part of u orthogonal to w comes from a difference of these sums.
                        u, w = u.double(), view.point().double()
                        of_work[Stat.WW].add_(_sum(w * w))
                        of_work[Stat.WU].add_(_sum(w * u))
                    # Many elements of ADOPT's and FOCUS's u are alike: a rounding of their norm would move all of them.
                    u = u.double() if work.switches.adopt or work.switches.focus else u
                    of_work[Stat.UU].add_(_sum_positive(u.mul_(u)))

    def count_masks(self) -> None:
        assert self._buffers.masks is not None
        for work in self.works:
            if not (work.owned and work.switches.counts_mask_late):
                continue
            scales = Scales(*_columns(self._buffers.scales, work))
            with self._sums(work, self._buffers.masks) as of_work:
                for view in self._tiles(work):
                    y = view.weights()
                    u = view.finished(view.direction()[0], scales, y)
                    mask = view.masked_step(u, y, view.load_state("z"))[1]
                    assert mask is not None
                    of_work[Stat.LATE_MASK].add_(_sum(mask))

    def pass_3(self, known: KnownGates | None, writes: Writes) -> None:
        for work in self.works:
            moment_gate, weight_gate = (self._gate(known, which, work) for which in (0, 1))
            if moment_gate is False:
                continue
            scales = Scales(*_columns(self._buffers.scales, work))
            c, of_axes = self._coefficients(work), self._of_axes(work)
            for view in self._views_of(work):
                enter = partial(view.enter, c, of_axes)
                writes.put(partial(self._stepped, enter, scales, moment_gate, weight_gate))

    def write_moments(self, writes: Writes) -> None:
        buffers = self._buffers
        writes.put(lambda: self._moments.committed(buffers.new_moments, buffers.gates.moments))

    def _stepped(
        self,
        enter: Callable[[], TileView],
        scales: Scales,
        moment_gate: Tensor | bool,
        weight_gate: Tensor | bool,
    ) -> Iterator[Write]:
        """What a tile holds after the step."""
        view = enter()
        u, moment, momentum = view.direction()
        if moment is not None:
            yield _gated(view.state("exp_avg_sq"), moment, moment_gate)
        if weight_gate is False:
            return
        if momentum is not None:
            yield _gated(view.state("exp_avg"), momentum, weight_gate)
        if view.work.switches.statistics and not view.work.switches.speed:
            new = view.gradient_sum(view.samples("s"), view.tile.sampled(view.g))
            yield _gated(view.sample_pieces("s"), new, weight_gate)
        y, z = self._moved(view, u, scales)
        if view.work.switches.stochastic_rounding and view.weight_pieces[0].dtype == torch.bfloat16:
            bits = self._random_bits(view)
            y = rounding.round_half_(y, rounding.high_half(bits))
            if z is not None and view.work.states["z"][0].dtype == torch.bfloat16:
                z = rounding.round_half_(z, rounding.low_half(bits))
        yield _gated(view.weight_pieces, y, weight_gate)
        if z is not None:
            yield _gated(view.state("z"), z, weight_gate)

    def _moved(self, view: TileView, u: Tensor, scales: Scales) -> tuple[Tensor, Tensor | None]:
        """y and z after a step along the direction, beside the ones before it."""
        c, switches = view.c, view.work.switches
        decays_apart = switches.weight_decay and not switches.weight_decay_by_lr
        y = view.weights()
        if not switches.schedulefree:
            u = view.finished(u, scales, y).mul_(c.delta)
            kept = torch.mul(y, c.keep, out=view.beside("y")) if switches.weight_decay else y
            return torch.sub(kept, u, out=view.beside("y")), None
        z = view.load_state("z")
        old_y = y.clone() if decays_apart else y
        if switches.masks_update:
            u = view.finished(u, scales, y)
            step, mask = view.masked_step(u, y, z)
            if mask is not None:
                step.mul_(mask).mul_(scales.mask)
            new_y = torch.sub(y, step, out=view.beside("y"))
            v = u.mul_(c.delta)
        else:
            if switches.orthograd or switches.weight_decay:
                v = view.finished(u, scales, y).mul_(c.delta)
            else:
                v = u.mul_(scales.advance)
            new_y = torch.lerp(y, z, c.c, out=view.beside("y")).addcmul_(v, c.q, value=-1)
        # Nobody needs the step itself any more.
        new_z = torch.sub(z, v, out=v)
        if decays_apart:
            new_z.addcmul_(old_y, c.weight_decay, value=-1)
            new_y.addcmul_(old_y, c.weight_decay * c.q, value=-1)
        return new_y, new_z

    def _random_bits(self, view: TileView) -> Tensor:
        """32 random bits for each element of the tile, from the element's place in the whole parameter."""
        work, tile = view.work, view.tile
        bits = self._workspace.take("bits", view.g, view.shape, torch.int32)
        numel = bits[0].numel()
        ones = [1] * len(tile.size)
        relative = self._workspace.counting(view.g, numel).view(tile.size) if tile.relative is None else tile.relative
        offset = (tile.offset + (1 << 31)) % (1 << 32) - (1 << 31)
        torch.add(relative, (work.starts + offset).view(-1, *ones), out=bits)
        bits.bitwise_xor_(self._buffers.keys[work.slot_index].view(-1, *ones))
        return rounding.mix_(bits, self._workspace.take("shifted", view.g, view.shape, torch.int32))

    def _sample_sums(self, view: TileView, of_work: Sequence[Tensor]) -> None:
        """Prodigy's and SPEED's sums over the samples."""
        work = view.work
        gradient = view.tile.sampled(view.g)
        p0 = view.samples("p0")
        stored = (work.states["z"] if work.switches.schedulefree else view.weight_pieces)[0].dtype
        difference = step_size.displacement(p0, view.tile.sampled(view.point()), stored)
        of_work[Stat.DOT].add_(_sum(gradient * difference))
        if work.switches.speed:
            of_work[Stat.DELTA_L1].add_(_sum(difference.abs()))
            of_work[Stat.DELTA_SQUARE].add_(_sum(difference * difference))
        else:
            s = view.gradient_sum(view.samples("s"), gradient)
            of_work[Stat.S_L1].add_(_sum_positive(s.float().abs_()))

    def _tiles(self, work: Work, *, factored: bool = True) -> Iterator[TileView]:
        c = self._coefficients(work)
        of_axes = self._of_axes(work) if factored else None
        for view in self._views_of(work):
            yield view.enter(c, of_axes)

    def _views_of(self, work: Work) -> list[TileView]:
        """Its tiles in this step."""
        known = self._views.get(id(work))
        if known is None:
            known = self._views[id(work)] = [TileView(self._workspace, work, tile) for tile in work.tiles]
        return known

    @contextmanager
    def _sums(self, work: Work, table: Tensor) -> Iterator[Sequence[Tensor]]:
        """Sums of the pieces of a work, by ``Stat``, which are added to a table of all parameters at the end."""
        sums = torch.zeros(table.shape[1], len(work.slots), dtype=table.dtype, device=table.device)
        yield sums.unbind()
        table.index_add_(0, work.slot_index, sums.t())

    def _coefficients(self, work: Work) -> SimpleNamespace:
        c = self._buffers.coefficients
        slot = work.slots[0] if len(work.slots) == 1 else None
        if slot in self._of_one:
            return self._of_one[slot]
        found = SimpleNamespace(**dict(zip(c.names, _columns(c.table, work), strict=True)))
        if slot is not None:
            self._of_one[slot] = found
        return found

    def _of_axes(self, work: Work) -> tuple[Tensor, Tensor] | None:
        """The factors of a work's rows and columns, if it is factored."""
        if work.row_index is None or work.col_index is None:
            return None
        factors = self._buffers.factors
        return factors[work.row_index], factors[work.col_index]

    def _gate(self, known: KnownGates | None, which: int, work: Work) -> Tensor | bool:
        """Whether a work is written: True or False where the host knows it for all pieces alike, else bools."""
        if known is not None:
            open_ = [known[which][slot] for slot in work.slots]
            if all(open_):
                return True
            if not any(open_):
                return False
        return self._buffers.gates[which][work.slot_index]


def _columns(table: Tensor, work: Work) -> tuple[Tensor, ...]:
    """The rows of a table (numbers by parameters) for the parameters of a work, shaped to broadcast on its tiles."""
    if len(work.slots) == 1:
        return table[:, work.slots[0]].unbind()
    return table[:, work.slot_index].view(len(table), -1, *[1] * len(work.size)).unbind()


def _sum(tile: Tensor) -> Tensor:
    """Sum over each piece of a tile, in fp64.

    From a rounded starting point the terms of Prodigy's sum cancel, up to a hundred thousand to one.
    """
    return tile.reshape(len(tile), -1).sum(1, dtype=torch.float64)


def _largest(squares: Tensor) -> Tensor:
    """Largest of each piece, NaN if one is: unlike their sum it is finite exactly if all of them are."""
    return squares.reshape(len(squares), -1).amax(1)


def _sum_positive(tile: Tensor) -> Tensor:
    """Sum over each piece of what is not negative, in its dtype: nothing cancels, and torch sums in blocks.

    ``torch.dot`` does not: over half a million elements it is off by 1e-5 in fp32.
    """
    return tile.reshape(len(tile), -1).sum(1)


def _gated(targets: Sequence[Tensor], values: Tensor, gate: Tensor | bool) -> Write:
    """The write of each piece to its place, as far as the gate is open."""
    if not isinstance(gate, Tensor):
        return Write(targets, values.unbind(0))
    if len(targets) == 1:
        return Write(targets, values.unbind(0), gate[0])
    values = values.to(targets[0].dtype)
    kept = torch.where(gate.view(-1, *[1] * targets[0].dim()), values, torch.stack(list(targets)))
    return Write(targets, kept.unbind(0))
