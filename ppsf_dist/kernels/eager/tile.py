"""One tile in one step: its tensors, and what the formulas make of them in each pass."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from ppsf_dist.algorithm import direction, second_moment, step_size
from ppsf_dist.kernels.eager.work import Tile, Work
from ppsf_dist.kernels.eager.workspace import Workspace
from ppsf_dist.kernels.interface import Scales


class TileView:
    """One tile of one work in one step: its tensors, and what the formulas make of them in each pass."""

    g: Tensor
    c: SimpleNamespace
    factors: tuple[Tensor, Tensor] | None

    def __init__(self, workspace: Workspace, work: Work, tile: Tile) -> None:
        self.workspace, self.work, self.tile = workspace, work, tile
        self.shape = (len(work.slots), *tile.size)
        self.weight_pieces = tile.cut(work.weights)
        self._gradients = tile.cut_some(work.gradients)
        self._states: dict[str, list[Tensor]] = {}
        self._loaded: dict[str, Tensor] = {}

    def enter(self, c: SimpleNamespace, factors: tuple[Tensor, Tensor] | None) -> TileView:
        """Begin a pass: other tiles have used the workspace since the one before."""
        workspace, tile = self.workspace, self.tile
        self.c = c
        self._loaded = {}
        if any(g is not None for g in self._gradients):
            self.g = workspace.load("g", self._gradients, tile.size)
        else:
            self.g = workspace.take("g", self.weight_pieces[0], self.shape).zero_()
        if self.work.switches.coupled_decay:
            decay = torch.mul(self.weights(), c.weight_decay, out=workspace.take("decay", self.g, self.shape))
            self.g = decay.add_(self.g)
        self.factors = None if factors is None else (tile.cut_axes(factors[0]), tile.cut_axes(factors[1]))
        return self

    def state(self, name: str) -> list[Tensor]:
        known = self._states.get(name)
        if known is None:
            known = self._states[name] = self.tile.cut(self.work.states[name])
        return known

    def load_state(self, name: str) -> Tensor:
        return self._load(name, self.state(name))

    def weights(self) -> Tensor:
        return self._load("y", self.weight_pieces)

    def beside(self, name: str) -> Tensor:
        """Memory for the new value of something loaded: the parameter and its state stay as they are."""
        loaded = self._loaded[name]
        pieces = self.weight_pieces if name == "y" else self.state(name)
        if loaded.data_ptr() != pieces[0].data_ptr():
            return loaded
        return self.workspace.take(f"new {name}", loaded, self.shape)

    def _load(self, name: str, pieces: list[Tensor]) -> Tensor:
        """The pieces as fp32, loaded once for each tile."""
        known = self._loaded.get(name)
        if known is None:
            known = self._loaded[name] = self.workspace.load(name, pieces, self.tile.size)
        return known

    def point(self) -> Tensor:
        """Where displacement, OrthoGrad and FOCUS look: z, or the weights without schedule-free."""
        return self.load_state("z") if self.work.switches.schedulefree else self.weights()

    def samples(self, name: str) -> Tensor:
        """``p0`` or ``s`` of the tile, ``(pieces, m)`` in its own dtype."""
        parts = self.sample_pieces(name)
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)

    def sample_pieces(self, name: str) -> list[Tensor]:
        known = self._states.get(name)
        if known is None:
            vectors = self.work.states[name]
            known = vectors if self.tile.full else [vector[self.tile.samples] for vector in vectors]
            self._states[name] = known
        return known

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
        if not switches.second_moment:
            return self.workspace.take("u", self.g, self.shape).copy_(self.g), None, None
        if self.factors is not None:
            u = torch.mul(*self.factors, out=self.workspace.take("u", self.g, self.shape))
        else:
            old, moment = self.second_moment(self.point() if switches.focus else self.g)
            of_u = old if switches.adopt else moment
            # A 16-bit moment has a 16-bit root, as in the reference.
            u = of_u.float() if switches.focus else of_u.sqrt().float()
            if switches.sgd_phase:
                u.mul_(c.root)
        if not switches.schedulefree and switches.momentum:
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
