"""The passes in plain PyTorch: readable, exact, on any device. The reference for every other backend.

All arithmetic is fp32 on tiles of shape ``(pieces, *size)``. Scalars come as tensors and stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ppsf_dist.algorithm import direction, rounding, second_moment, step_size
from ppsf_dist.kernels.interface import Coefficients, Gates, Scales, Stat
from ppsf_dist.work import Tile, Work


class Workspace:
    """Named fp32 buffers that tiles reuse, so that a step allocates nothing of the size of a parameter."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._counting: dict[torch.device, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer of the given shape on the device of ``like``; its content is arbitrary."""
        key = (name, like.device, dtype)
        numel = 1
        for n in shape:
            numel *= n
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:numel].view(shape)

    def counting(self, like: Tensor, numel: int) -> Tensor:
        """0, 1, 2, ... as int32."""
        known = self._counting.get(like.device)
        if known is None or known.numel() < numel:
            known = torch.arange(numel, dtype=torch.int32, device=like.device)
            self._counting[like.device] = known
        return known[:numel]

    def load(self, name: str, pieces: Sequence[Tensor | None], size: Sequence[int], *, private: bool = False) -> Tensor:
        """The pieces as one fp32 tile. May share memory with a single fp32 piece unless ``private``."""
        single = pieces[0]
        if len(pieces) == 1 and single is not None and single.dtype == torch.float32 and not private:
            return single.unsqueeze(0)
        like = next(piece for piece in pieces if piece is not None)
        buffer = self.take(name, like, (len(pieces), *size))
        if len(pieces) == 1:
            return buffer.copy_(like.unsqueeze(0))
        present = [torch.zeros_like(like) if piece is None else piece for piece in pieces]
        if like.dtype == torch.float32:
            return torch.stack(present, out=buffer)
        return buffer.copy_(torch.stack(present))


class TileView:
    """One tile of one work in one pass: its tensors, and what the formulas make of them."""

    def __init__(
        self,
        workspace: Workspace,
        work: Work,
        tile: Tile,
        c: Coefficients,
        factors: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.workspace, self.work, self.tile, self.c = workspace, work, tile, c
        self.shape = (len(work.slots), *tile.size)
        self._loaded: dict[str, Tensor] = {}
        self.weight_pieces = tile.cut(work.weights)
        if any(g is not None for g in work.gradients):
            self.g = workspace.load("g", tile.cut_some(work.gradients), tile.size)
        else:
            self.g = workspace.take("g", self.weight_pieces[0], self.shape).zero_()
        self.factors = None if factors is None else (tile.cut_axes(factors[0]), tile.cut_axes(factors[1]))

    def state(self, name: str) -> list[Tensor]:
        return self.tile.cut(self.work.states[name])

    def load_state(self, name: str, *, private: bool = False) -> Tensor:
        return self._load(name, self.state(name), private)

    def weights(self, *, private: bool = False) -> Tensor:
        return self._load("y", self.weight_pieces, private)

    def _load(self, name: str, pieces: list[Tensor], private: bool) -> Tensor:
        """The pieces as fp32, loaded once for each tile."""
        known = self._loaded.get(name)
        if known is None or (private and known.data_ptr() == pieces[0].data_ptr()):
            known = self._loaded[name] = self.workspace.load(name, pieces, self.tile.size, private=private)
        return known

    def point(self) -> Tensor:
        """Where displacement, OrthoGrad and FOCUS look: z, or the weights without schedule-free."""
        return self.load_state("z") if self.work.switches.schedulefree else self.weights()

    def samples(self, name: str) -> Tensor:
        """``p0`` or ``s`` of the tile, ``(pieces, m)`` in its own dtype."""
        parts = self.sample_pieces(name)
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)

    def sample_pieces(self, name: str) -> list[Tensor]:
        vectors = self.work.states[name]
        return vectors if self.tile.full else [vector[self.tile.samples] for vector in vectors]

    def gradient_sum(self, s: Tensor, gradient: Tensor) -> Tensor:
        """Prodigy's s after this step, from the sampled gradient ``(pieces, m)``."""
        beta3, weight = (t if t.dim() == 0 else t.view(-1, 1) for t in (self.c.beta3, self.c.s_weight))
        return step_size.gradient_sum(s, beta3, weight, gradient, self.weight_pieces[0].dtype)

    def second_moment(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The stored elementwise second moment and its value after this step, both in the stored dtype."""
        pieces = self.state("exp_avg_sq")
        old = pieces[0].unsqueeze(0) if len(pieces) == 1 else torch.stack(pieces)
        square = point if self.work.switches.focus else self.g * self.g
        c = self.c
        if old.dtype == torch.float32:
            return old, second_moment.ema_(old.clone(), c.beta2, c.square_weight, square)
        return old, second_moment.ema_low_precision(old, c.beta2, c.square_weight, square)

    def direction(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The direction u in units of ``gain``, and the new second moment and momentum where they are elementwise."""
        switches, c = self.work.switches, self.c
        moment: Tensor | None = None
        if self.factors is not None:
            u = torch.mul(*self.factors, out=self.workspace.take("u", self.g, self.shape))
        else:
            old, moment = self.second_moment(self.point() if switches.focus else self.g)
            of_u = old if switches.adopt else moment
            # A 16-bit moment has a 16-bit root, as in the reference.
            u = of_u.float() if switches.focus else of_u.sqrt().float()
        if not switches.schedulefree:
            return self._momentum_direction(u, moment)
        if switches.focus:
            return direction.focus(self.g, self.point(), u * c.focus_correction), moment, None
        if switches.atan2:
            return direction.atan2_(u, self.g * c.d), moment, None
        if switches.adopt and not switches.quirks:
            u = direction.divide_(u, self.g * c.d, c.d_eps)
            return torch.clamp(u, -c.clamp, c.clamp, out=u), moment, None
        return direction.divide_(u, self.g, c.d_eps), moment, None

    def momentum(self) -> Tensor:
        """Without schedule-free: the momentum after this step."""
        if not self.work.switches.adopt:
            return self._momentum(self.g)
        momentum = self.direction()[2]
        assert momentum is not None
        return momentum

    def _momentum_direction(self, u: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Without schedule-free: the direction of a momentum. ``u`` is the denominator on entry."""
        switches, c = self.work.switches, self.c
        if switches.adopt:
            numerator = self.g if switches.quirks else self.g * c.d
            n = self._divided(u, numerator, self.point())
            momentum = self._momentum(torch.clamp(n, -c.clamp, c.clamp))
            return self._masked(momentum), moment, momentum
        momentum = self._momentum(self.g)
        return self._divided(u, self._masked(momentum), self.point()), moment, momentum

    def _divided(self, u: Tensor, numerator: Tensor, point: Tensor) -> Tensor:
        switches, c = self.work.switches, self.c
        if switches.focus:
            return direction.focus(numerator, point, u * c.focus_correction)
        return direction.atan2_(u, numerator) if switches.atan2 else direction.divide_(u, numerator, c.d_eps)

    def _momentum(self, increment: Tensor) -> Tensor:
        """The momentum after this step as it will be stored, in fp32."""
        pieces = self.state("exp_avg")
        old = pieces[0].unsqueeze(0) if len(pieces) == 1 else torch.stack(pieces)
        if old.dtype == torch.float32:
            return second_moment.ema_(old.clone(), self.c.beta1, self.c.momentum_weight, increment)
        return second_moment.ema_low_precision(old, self.c.beta1, self.c.momentum_weight, increment).float()

    def _masked(self, momentum: Tensor) -> Tensor:
        if self.work.switches.cautious:
            return momentum * direction.aligned(self.g, momentum)
        if self.work.switches.grams:
            return direction.grams_momentum(self.g, momentum)
        return momentum.clone()

    def finished(self, u: Tensor, scales: Scales, y: Tensor) -> Tensor:
        """The direction with OrthoGrad, StableAdamW, the early mask and the weight decay of schedule-free, in place."""
        switches = self.work.switches
        u.mul_(scales.amount)
        if switches.orthograd:
            u.addcmul_(self.point(), scales.pull, value=-1)
        if switches.schedulefree and switches.weight_decay and switches.weight_decay_by_lr:
            u.addcmul_(y, self.c.weight_decay)
        return u

    def masked_step(self, u: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The step of y (to be subtracted) under the schedule-free forms of cautious and Grams, and its mask."""
        step = (y - z).mul_(self.c.c).addcmul_(u, self.c.q * self.c.delta)
        if self.work.switches.cautious:
            return step, direction.aligned(u, step)
        return step.abs_().mul_(u.sign()), None


class EagerKernels:
    """Implements :class:`ppsf_dist.kernels.interface.Kernels`."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def pass_1(self, works: Sequence[Work], coefficients: Tensor, factors: Tensor, sums: Tensor, stats: Tensor) -> None:
        for work in works:
            if not work.owned:
                self._check_finite(work, coefficients, stats)
                continue
            switches = work.switches
            row_sums = None if work.row_index is None else torch.zeros_like(work.row_index, dtype=torch.float32)
            col_sums = None if work.col_index is None else torch.zeros_like(work.col_index, dtype=torch.float32)
            local = self._local_stats(work, stats)
            for view in self._tiles(work, coefficients, factors if switches.adopt else None):
                square = torch.mul(view.g, view.g, out=self._workspace.take("u", view.g, view.shape))
                if row_sums is not None and col_sums is not None and work.row_axis is not None:
                    assert work.col_axis is not None
                    view.tile.cut_axes(row_sums).add_(square.sum(work.row_axis + 1, keepdim=True))
                    view.tile.cut_axes(col_sums).add_(square.sum(work.col_axis + 1, keepdim=True))
                else:
                    local[:, Stat.GRAD_SQUARE] += _sum(square)
                if switches.statistics:
                    self._sample_sums(view, local)
                if switches.counts_mask_early:
                    local[:, Stat.EARLY_MASK] += _sum(direction.aligned(view.g, view.momentum()))
            if row_sums is not None and col_sums is not None:
                assert work.row_index is not None and work.col_index is not None
                sums.index_add_(0, work.row_index.view(-1), row_sums.view(-1))
                sums.index_add_(0, work.col_index.view(-1), col_sums.view(-1))
                local[:, Stat.GRAD_SQUARE] += _sum(row_sums)
            stats.index_add_(0, work.slot_index, local)

    def pass_2(self, works: Sequence[Work], coefficients: Tensor, factors: Tensor, stats: Tensor) -> None:
        for work in works:
            if not (work.owned and work.switches.needs_norms):
                continue
            local = self._local_stats(work, stats)
            for view in self._tiles(work, coefficients, factors):
                u = view.direction()[0]
                if work.switches.orthograd:
                    # fp64: the part of u orthogonal to w comes from a difference of these sums.
                    u, w = u.double(), view.point().double()
                    local[:, Stat.WW] += _sum(w * w)
                    local[:, Stat.WU] += _sum(w * u)
                local[:, Stat.UU] += _dot(u)
            stats.index_add_(0, work.slot_index, local)

    def count_masks(
        self, works: Sequence[Work], coefficients: Tensor, factors: Tensor, scales: Tensor, stats: Tensor
    ) -> None:
        for work in works:
            if not (work.owned and work.switches.counts_mask_late):
                continue
            local = self._local_stats(work, stats)
            of_work = Scales(*_columns(scales, work))
            for view in self._tiles(work, coefficients, factors):
                y = view.weights()
                u = view.finished(view.direction()[0], of_work, y)
                mask = view.masked_step(u, y, view.load_state("z"))[1]
                assert mask is not None
                local[:, Stat.LATE_MASK] += _sum(mask)
            stats.index_add_(0, work.slot_index, local)

    def pass_3(
        self, works: Sequence[Work], coefficients: Tensor, factors: Tensor, scales: Tensor, gates: Gates, keys: Tensor
    ) -> None:
        for work in works:
            moment_gate, weight_gate = (_gate(gates, which, work) for which in (0, 1))
            if moment_gate is False:
                continue
            of_work = Scales(*_columns(scales, work))
            for view in self._tiles(work, coefficients, factors):
                u, moment, momentum = view.direction()
                if moment is not None:
                    _store(view.state("exp_avg_sq"), moment, moment_gate)
                if weight_gate is False:
                    continue
                if momentum is not None:
                    _store(view.state("exp_avg"), momentum, weight_gate)
                if work.switches.statistics and not work.switches.speed:
                    s = view.samples("s")
                    new = view.gradient_sum(s, view.tile.sampled(view.g))
                    _store(view.sample_pieces("s"), new, weight_gate)
                self._move(view, u, of_work, weight_gate, keys)

    def _move(self, view: TileView, u: Tensor, scales: Scales, gate: Tensor | bool, keys: Tensor) -> None:
        """Steps of y and z along the direction."""
        work, c = view.work, view.c
        switches = work.switches
        private = gate is not True
        y = view.weights(private=private)
        decays_apart = switches.weight_decay and not switches.weight_decay_by_lr
        if not switches.schedulefree:
            u = view.finished(u, scales, y).mul_(c.delta)
            if switches.weight_decay:
                y.mul_(c.keep)
            y.sub_(u)
            self._write(view, y, None, gate, keys)
            return
        z = view.load_state("z", private=private)
        old_y = y.clone() if decays_apart else None
        if switches.masks_update:
            u = view.finished(u, scales, y)
            step, mask = view.masked_step(u, y, z)
            if mask is not None:
                step.mul_(mask).mul_(scales.mask)
            y.sub_(step)
            z.sub_(u.mul_(c.delta))
        else:
            if switches.orthograd or switches.weight_decay:
                v = view.finished(u, scales, y).mul_(c.delta)
            else:
                v = u.mul_(scales.advance)
            y.lerp_(z, c.c)
            y.addcmul_(v, c.q, value=-1)
            z.sub_(v)
        if old_y is not None:
            z.addcmul_(old_y, c.weight_decay, value=-1)
            y.addcmul_(old_y, c.weight_decay * c.q, value=-1)
        self._write(view, y, z, gate, keys)

    def _write(self, view: TileView, y: Tensor, z: Tensor | None, gate: Tensor | bool, keys: Tensor) -> None:
        """Round to the dtypes of the parameter and of z, and store."""
        work = view.work
        if work.switches.stochastic_rounding and view.weight_pieces[0].dtype == torch.bfloat16:
            bits = self._random_bits(view, keys)
            y = rounding.round_half_(y, rounding.high_half(bits))
            if z is not None and work.states["z"][0].dtype == torch.bfloat16:
                z = rounding.round_half_(z, rounding.low_half(bits))
        _store(view.weight_pieces, y, gate)
        if z is not None:
            _store(view.state("z"), z, gate)

    def _random_bits(self, view: TileView, keys: Tensor) -> Tensor:
        """32 random bits for each element of the tile, from the element's place in the whole parameter."""
        work, tile = view.work, view.tile
        bits = self._workspace.take("bits", view.g, view.shape, torch.int32)
        numel = bits[0].numel()
        ones = [1] * len(tile.size)
        relative = self._workspace.counting(view.g, numel).view(tile.size) if tile.relative is None else tile.relative
        offset = (tile.offset + (1 << 31)) % (1 << 32) - (1 << 31)
        torch.add(relative, (work.starts + offset).view(-1, *ones), out=bits)
        bits.bitwise_xor_(keys[work.slot_index].view(-1, *ones))
        return rounding.mix_(bits, self._workspace.take("shifted", view.g, view.shape, torch.int32))

    def _check_finite(self, work: Work, coefficients: Tensor, stats: Tensor) -> None:
        """A replica's part in the sums: 0, unless its gradient is not finite."""
        local = self._local_stats(work, stats)
        for view in self._tiles(work, coefficients, None):
            square = torch.mul(view.g, view.g, out=self._workspace.take("u", view.g, view.shape))
            local[:, Stat.GRAD_SQUARE] += _sum(square) * 0
        stats.index_add_(0, work.slot_index, local)

    def _sample_sums(self, view: TileView, local: Tensor) -> None:
        """Prodigy's and SPEED's sums over every 11th element."""
        work = view.work
        gradient = view.tile.sampled(view.g)
        p0 = view.samples("p0")
        stored = (work.states["z"] if work.switches.schedulefree else view.weight_pieces)[0].dtype
        difference = step_size.displacement(p0, view.tile.sampled(view.point()), stored)
        local[:, Stat.DOT] += _sum(gradient * difference)
        if work.switches.speed:
            local[:, Stat.DELTA_L1] += _sum(difference.abs())
            local[:, Stat.DELTA_SQUARE] += _sum(difference * difference)
        else:
            s = view.gradient_sum(view.samples("s"), gradient)
            local[:, Stat.S_L1] += _sum(s.float().abs_())

    def _tiles(self, work: Work, coefficients: Tensor, factors: Tensor | None) -> Iterator[TileView]:
        c = Coefficients(*_columns(coefficients, work))
        rows_and_cols = None
        if factors is not None and work.row_index is not None and work.col_index is not None:
            rows_and_cols = (factors[work.row_index], factors[work.col_index])
        for tile in work.tiles:
            yield TileView(self._workspace, work, tile, c, rows_and_cols)

    @staticmethod
    def _local_stats(work: Work, stats: Tensor) -> Tensor:
        return torch.zeros(len(work.slots), stats.shape[1], dtype=stats.dtype, device=stats.device)


def _columns(table: Tensor, work: Work) -> tuple[Tensor, ...]:
    """The rows of a table (numbers by parameters) for the parameters of a work, shaped to broadcast on its tiles."""
    if len(work.slots) == 1:
        return table[:, work.slots[0]].unbind()
    return table[:, work.slot_index].view(len(table), -1, *[1] * len(work.size)).unbind()


def _sum(tile: Tensor) -> Tensor:
    """Sum over each piece of a tile, in fp64."""
    # In fp64: from a rounded starting point the terms of Prodigy's sum cancel, up to a hundred thousand to one.
    return tile.reshape(len(tile), -1).sum(1, dtype=torch.float64)


def _dot(u: Tensor) -> Tensor:
    """Sum of squares over each piece."""
    if len(u) == 1:
        flat = u.reshape(-1)
        return torch.dot(flat, flat).double()
    return _sum(u * u)


def _gate(gates: Gates, which: int, work: Work) -> Tensor | bool:
    """Whether a work is written: True or False where the host knows it for all pieces alike, else a column of bools."""
    if gates.known is not None:
        open_ = [gates.known[which][slot] for slot in work.slots]
        if all(open_):
            return True
        if not any(open_):
            return False
    return (gates.moments, gates.weights)[which][work.slot_index]


def _store(targets: Sequence[Tensor], values: Tensor, gate: Tensor | bool) -> None:
    """Write each piece to its place. Through an open gate a value computed in place is already there."""
    if isinstance(gate, Tensor):
        values = values.to(targets[0].dtype)
        if len(targets) == 1:
            torch.where(gate[0], values[0], targets[0], out=targets[0])
            return
        values = torch.where(gate.view(-1, *[1] * targets[0].dim()), values, torch.stack(list(targets)))
    pieces = values.unbind(0)
    if pieces[0].data_ptr() != targets[0].data_ptr():
        torch._foreach_copy_(list(targets), list(pieces))
