"""The same shards, state and numbers twice, for two backends to work on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppsf_dist.algorithm.second_moment import factoring
from ppsf_dist.kernels.interface import Buffers, Coefficients, Gates, Kernels, Passes, Scales
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Box, Shard
from ppsf_dist.sharding.geometry import flat_range, whole
from ppsf_dist.state.inventory import Holds, Lies, needed
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.samples import sample_count
from ppsf_dist.state.writes import Writes

NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "delta": lambda r: 1e-2 * (1 + r),
    "c": lambda r: r,
    "q": lambda r: 1 - 0.9 * (1 - r),
    "beta1": lambda r: 0.9 + 0.05 * r,
    "weight_decay": lambda r: 0.1 * (1 + r),
    "keep": lambda r: 1 - 1e-3 * r,
    "gain": lambda r: 1e-3 * (1 + r),
    "d": lambda r: 1e-3 * (1 + r),
    "d_eps": lambda r: 1e-8 * (1 + r),
    "momentum_weight": lambda r: 1e-4 * (1 + r),
    "beta2": lambda r: 0.99 + 0.005 * r,
    "square_weight": lambda r: 1e-8 * (1 + r),
    "focus_correction": lambda r: 1 + r,
    "clamp": lambda r: 1 + r,
    "beta3": lambda r: 0.99 + 0.005 * r,
    "s_weight": lambda r: 1e-2 * (1 + r),
    "root": lambda r: (r > 0.3).float(),
}
"""Coefficients of an ordinary step, from numbers between 0 and 1, another one for each parameter."""


@dataclass(frozen=True)
class Cut:
    """What a shard holds of a parameter: all of it, a box, or a range of it flattened."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    flat: bool = False

    @classmethod
    def everything(cls, shape: tuple[int, ...]) -> Cut:
        return cls(shape, (whole(shape),))

    @classmethod
    def box(cls, shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...]) -> Cut:
        return cls(shape, (Box(shape, offset, size),))

    @classmethod
    def range(cls, shape: tuple[int, ...], start: int, numel: int) -> Cut:
        return cls(shape, tuple(flat_range(shape, start, numel)), flat=True)

    @property
    def local(self) -> tuple[int, ...]:
        return (sum(box.numel for box in self.boxes),) if self.flat else self.boxes[0].size


CUTS = {
    "whole": Cut.everything((40, 70)),
    "tall": Cut.everything((70, 12)),
    "very tall": Cut.everything((300, 12)),
    "odd": Cut.everything((33,)),
    "long": Cut.everything((9001,)),
    "flat": Cut.range((50, 40), 13, 777),
    "columns": Cut.box((50, 40), (3, 5), (20, 31)),
    "stack": Cut.everything((3, 40, 20)),
    "convolution": Cut.everything((36, 5, 3, 3)),
    "part of a stack": Cut.range((3, 5, 40), 170, 250),
    "wide": Cut.box((40, 300), (0, 10), (40, 280)),
    "small": Cut.everything((5, 33)),
    "number": Cut.everything(()),
}
"""Of every kind that kernels have a way of their own for."""


@dataclass
class Side:
    """What a backend is given, tensors of its own."""

    shards: list[Shard]
    switches: list[Switches]
    moments: FactoredMoments
    state: dict[Tensor, dict[str, Tensor]]
    gradients: list[Tensor | None]
    buffers: Buffers
    passes: Passes = field(init=False)

    def prepare(self, kernels: Kernels) -> None:
        slots = list(range(len(self.shards)))
        self.passes = kernels.prepare(self.shards, slots, self.switches, self.moments, self.state, self.buffers)

    def bind(self) -> None:
        self.passes.bind([shard.weights() for shard in self.shards], self.gradients)

    def write(self) -> None:
        writes = Writes()
        self.passes.write_moments(writes)
        gates = self.buffers.gates
        self.passes.pass_3((gates.moments.tolist(), gates.weights.tolist()), writes)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step writes."""
        found = {"moments": self.moments.values}
        for index, shard in enumerate(self.shards):
            found[f"y of {index}"] = shard.weights().detach()
            found |= {f"{name} of {index}": value for name, value in self.state[shard.param].items()}
        return found


def make(
    cuts: Sequence[Cut],
    switches: Switches,
    dtype: torch.dtype,
    *,
    seed: int,
    missing: Sequence[int] = (),
    closed: Sequence[int] = (),
    replicas: Sequence[int] = (),
    device: str = "cpu",
) -> Side:
    """Random weights, state, gradients and numbers.

    Args:
        cuts: a shard each, of a parameter of its own.
        switches: of all of them.
        dtype: of weights and gradients.
        seed: of everything random.
        missing: shards without a gradient.
        closed: those that are not written.
        replicas: those that another rank counts.
        device: where all of it is. The values are the same on each.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(shape: Sequence[int], scale: float) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator) * scale).to(device)

    shards, gradients, state, factored = [], [], {}, []
    for index, cut in enumerate(cuts):
        shard = Shard(nn.Parameter(random(cut.local, 0.02).to(dtype)), cut.shape, cut.boxes, index not in replicas)
        shards.append(shard)
        gradients.append(None if index in missing else random(cut.local, 0.01).to(dtype))
        axes = factoring(cut.shape) if switches.second_moment and switches.factored else None
        factored.append(None if axes is None else (axes, switches.quirks, torch.float32))
        entries: dict[str, Tensor] = {}
        for entry in needed(switches, cut.shape):
            if entry.lies is Lies.REPLICATED:
                continue
            sampled = entry.lies is Lies.SAMPLED
            shape = (sample_count(shard, switches.slice_p),) if sampled else cut.local
            value = random(shape, 1e-6 if entry.holds is Holds.SQUARES else 0.02)
            value = value.abs() if entry.holds is Holds.SQUARES else value
            entries[entry.name] = value.to(entry.dtype(dtype, switches))
        state[shard.param] = entries
    moments = FactoredMoments(factored, torch.device(device))
    moments.values.copy_(random((len(moments),), 1e-6).abs())
    count = len(cuts)
    rates = torch.rand(len(NUMBERS), count, generator=generator)
    coefficients = Coefficients(NUMBERS, count, torch.device(device))
    rows = [make(rate) for make, rate in zip(NUMBERS.values(), rates, strict=True)]
    coefficients.fill(torch.stack(rows).to(device), torch.arange(count, device=device))
    opened = torch.tensor([index not in closed for index in range(count)], device=device)
    stats = torch.zeros(count, len(Stat), dtype=torch.float64, device=device)
    amount = torch.rand(count, generator=generator).to(device)
    buffers = Buffers(
        coefficients=coefficients,
        factors=torch.zeros(len(moments), device=device),
        new_moments=torch.zeros(len(moments), device=device),
        adopt=None,
        scales=torch.stack([amount, 0 * amount, 1 + amount, amount * coefficients["delta"]]),
        keys=torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(device, torch.int32),
        gates=Gates(opened, opened.clone()),
        sums=torch.zeros(len(moments), device=device),
        stats=stats,
        masks=torch.zeros_like(stats),
    )
    assert buffers.scales.shape[0] == len(Scales._fields)
    return Side(shards, [switches] * count, moments, state, gradients, buffers)


def twin(side: Side) -> Side:
    """The same on memory of its own."""
    copied: Side = copy.deepcopy(side)
    return copied


def terms(side: Side, slot: int) -> Any:
    """The largest that Prodigy's sum of a parameter can be: what its rounding is measured by."""
    gradient, shard = side.gradients[slot], side.shards[slot]
    state: dict[str, Tensor] = side.state[shard.param]
    pull: Any = 0.0
    if "p0" not in state or not state["p0"].numel():
        return 0.0
    if gradient is not None:
        pull += gradient.abs().double().sum()
    if side.switches[slot].coupled_decay:
        pull += side.buffers.coefficients["weight_decay"][slot] * shard.weights().abs().double().sum()
    return pull * (state["p0"].abs().max() + 1)
