"""The local shards, cut and stacked into work for the kernels.

A large tensor is walked in tiles that fit a cache; small tensors of equal shape are stacked and computed as one.
Either way a kernel sees a list of equally shaped pieces and the switches they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppsf_dist.algorithm import rounding
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Box, Shard
from ppsf_dist.sharding.geometry import Shape
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.samples import count_in, sample_indices


class Sizes(NamedTuple):
    """How tensors are cut and stacked.

    Attributes:
        tile: elements of a tile. Each pass keeps a handful of fp32 temporaries of this size.
        stack: tensors up to this size are stacked with others of their shape.
    """

    tile: int
    stack: int


IN_CACHE = Sizes(tile=1 << 19, stack=1 << 17)
"""On a CPU: temporaries stay in a core's second- or third-level cache."""

TEMPORARIES = 13
"""Tiles of fp32 numbers that a step needs at most, whatever its switches."""
_SHARE = 25
_LARGEST = 1 << 25
_UNKNOWN = 24 * 10**9


def few_launches(memory: int) -> Sizes:
    """On an accelerator, where starting an operator takes the host as long as four million elements take the device.

    What a step needs beside parameters and state may take a twenty-fifth of its memory. A tile of more than 32 million
    elements gains nothing: computing it takes longer than starting it.

    Args:
        memory: bytes of the device.
    """
    most = max(2, min(_LARGEST, memory // (_SHARE * TEMPORARIES * 4)))
    tile = 1 << most.bit_length() - 1
    return Sizes(tile=tile, stack=min(1 << 22, tile // 2))


def sizes_for(device: torch.device) -> Sizes:
    """The sizes that suit a device."""
    return IN_CACHE if device.type == "cpu" else few_launches(memory_of(device))


@cache
def memory_of(device: torch.device) -> int:
    """Bytes of an accelerator; 24 GB where it does not say."""
    properties = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    return _UNKNOWN if properties is None else int(getattr(properties(device), "total_memory", _UNKNOWN))


State = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class Tile:
    """One tile of the pieces of a ``Work``, and the samples that lie in it.

    Attributes:
        start, size: the tile as a box relative to the piece.
        full: whether it is the whole piece.
        samples: its part of the piece's samples.
        phase, slice_p: first sampled element, and the distance of the others (unless ``index`` says otherwise).
        index: positions of the sampled elements, where they are not evenly spaced.
        offset: distance in the flattened parameter from the piece's first element to the tile's.
        relative: the same from the tile's first element to each, where they are not consecutive (int32).
    """

    start: Shape
    size: Shape
    full: bool
    samples: slice
    phase: int
    slice_p: int
    index: Tensor | None
    offset: int
    relative: Tensor | None

    def cut(self, pieces: list[Tensor]) -> list[Tensor]:
        """The tile of each piece."""
        return pieces if self.full else [self._narrow(piece) for piece in pieces]

    def cut_some(self, pieces: list[Tensor | None]) -> list[Tensor | None]:
        """The tile of each piece that is there."""
        return pieces if self.full else [None if piece is None else self._narrow(piece) for piece in pieces]

    def cut_axes(self, vectors: Tensor) -> Tensor:
        """The tile of row or column vectors shaped ``(pieces, *box)`` with collapsed axes."""
        if self.full:
            return vectors
        for axis, (start, n) in enumerate(zip(self.start, self.size, strict=True)):
            if vectors.shape[axis + 1] != 1:
                vectors = vectors.narrow(axis + 1, start, n)
        return vectors

    def sampled(self, stacked: Tensor) -> Tensor:
        """The sampled elements of ``(pieces, *size)``, as ``(pieces, m)``, one after the other."""
        flat = stacked.reshape(stacked.shape[0], -1)
        if self.index is not None:
            return flat.index_select(1, self.index)
        return flat[:, self.phase :: self.slice_p].contiguous()

    def _narrow(self, piece: Tensor) -> Tensor:
        for axis, (start, n) in enumerate(zip(self.start, self.size, strict=True)):
            if n != piece.shape[axis]:
                piece = piece.narrow(axis, start, n)
        return piece


@dataclass
class Work:
    """Equally shaped pieces of different parameters that share their switches.

    ``rows`` says which of all shards are its own.
    """

    switches: Switches
    size: Shape
    boxes: list[Box]
    shards: list[Shard]
    rows: list[int]
    box_indices: list[int]
    slots: list[int]
    tiles: list[Tile]
    flat: bool
    row_axis: int | None = None
    col_axis: int | None = None
    slot_index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    starts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    row_index: Tensor | None = None
    col_index: Tensor | None = None
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    direct: bool = False
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)

    def bind(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take this step's weights and gradients from those of all shards."""
        self.weights = self.pieces([weights[row] for row in self.rows])
        of_shards = [gradients[row] for row in self.rows]
        if self.direct:
            self.gradients = of_shards
        else:
            self.gradients = [
                None if gradient is None else self._piece(shard, index, gradient)
                for shard, index, gradient in zip(self.shards, self.box_indices, of_shards, strict=True)
            ]

    def release(self) -> None:
        """Let go of the gradients, so that the next backward pass finds their memory free."""
        self.gradients = []

    def pieces(self, locals_: list[Tensor]) -> list[Tensor]:
        """This work's pieces of one local tensor for each of its shards."""
        if self.direct:
            return locals_
        return [self._piece(shard, i, t) for shard, i, t in zip(self.shards, self.box_indices, locals_, strict=True)]

    def _piece(self, shard: Shard, box_index: int, local: Tensor) -> Tensor:
        view = shard.views(local)[box_index]
        return view.reshape(self.size) if self.flat else view

    @property
    def owned(self) -> bool:
        return self.shards[0].owner


def plan_work(
    shards: Sequence[Shard],
    slots: Sequence[int],
    switches: Sequence[Switches],
    moments: FactoredMoments,
    state: State,
) -> list[Work]:
    """Group the pieces of the local shards into work.

    Args:
        shards: the local shards, with their slot and switches each.
        moments: the factored buffer, which knows the parameters that it holds.
        state: state tensors of each parameter, laid out like its local weights (``p0`` and ``s``: one value for each
            sample).
    """
    batches: dict[object, list[Work]] = {}
    works: list[Work] = []
    for row, (shard, slot, switch) in enumerate(zip(shards, slots, switches, strict=True)):
        placed = moments.placed[slot]
        local = shard.weights()
        first_sample = 0
        for box_index, box in enumerate(shard.boxes):
            flat = placed is None and box.is_flat and local.is_contiguous()
            size = (box.numel,) if flat else box.size
            samples = slice(first_sample, first_sample + count_in(box, switch.slice_p))
            first_sample = samples.stop
            if box.numel == 0:
                continue
            axes = None if placed is None else (placed.factoring.dr, placed.factoring.dc)
            phase = -box.flat_start % switch.slice_p if box.is_flat else box.offset
            stored = [(name, value.dtype) for name, value in state[shard.param].items() if isinstance(value, Tensor)]
            dtypes = tuple(sorted(stored, key=str))
            key = (switch, size, flat, axes, phase, box.shape, shard.owner, local.dtype, local.device, dtypes)
            stack = batches.setdefault(key, [])
            sizes = sizes_for(local.device)
            room = box.numel <= sizes.stack and box.numel * 2 <= sizes.tile
            if not (room and stack and _fits(stack[-1], slot, box.numel, sizes.tile)):
                tiles = _tiles(box, size, samples, flat, sizes.tile, switch.slice_p)
                stack.append(Work(switch, size, [], [], [], [], [], tiles, flat))
                works.append(stack[-1])
                if axes is not None:
                    stack[-1].row_axis, stack[-1].col_axis = axes
            work = stack[-1]
            work.boxes.append(box)
            work.shards.append(shard)
            work.rows.append(row)
            work.box_indices.append(box_index)
            work.slots.append(slot)
            for name in ("p0", "s"):
                if name in state[shard.param]:
                    work.states.setdefault(name, []).append(state[shard.param][name][samples])
    for work in works:
        _finish(work, moments, state)
    return works


def _fits(work: Work, slot: int, numel: int, limit: int) -> bool:
    """Whether a stack has room for one more piece; two pieces of one parameter never share a stack."""
    return slot not in work.slots and (len(work.slots) + 1) * numel <= limit


def _tiles(box: Box, size: Shape, samples: slice, flat: bool, limit: int, slice_p: int) -> list[Tile]:
    """Tiles of a piece; ``samples`` are then relative to the piece."""
    outline = Box((box.numel,), (0,), (box.numel,)) if flat else Box(box.size, (0,) * len(box.size), box.size)
    tiles, first = [], 0
    for start, tile_size in outline.tiles(limit):
        if flat:
            inner_start, numel = box.flat_start + start[0], tile_size[0]
            phase, index = -inner_start % slice_p, None
            count = len(range(phase, numel, slice_p))
            offset, relative = start[0], None
        else:
            inner = box.narrow(start, tile_size)
            count = count_in(inner, slice_p)
            evenly = inner.is_flat or slice_p == 1
            phase, index = (-inner.flat_start % slice_p, None) if evenly else (0, sample_indices(inner, slice_p))
            offset, relative = inner.flat_start - box.flat_start, None
            if not inner.is_flat:
                relative = (inner.flat_index() - inner.flat_start).to(torch.int32).view(tile_size)
        window = slice(first, first + count)
        tiles.append(Tile(start, tile_size, tile_size == size, window, phase, slice_p, index, offset, relative))
        first += count
    return tiles


def _finish(work: Work, moments: FactoredMoments, state: State) -> None:
    """Look up what the kernels would otherwise look up in every step."""
    device = work.shards[0].weights().device
    work.slot_index = torch.tensor(work.slots, device=device)
    # Pieces that are whole local tensors of the right shape need no view.
    work.direct = all(len(s.boxes) == 1 and tuple(s.weights().shape) == work.size for s in work.shards)
    for name in ("z", "exp_avg", "exp_avg_sq"):
        if name in state[work.shards[0].param]:
            work.states[name] = work.pieces([state[shard.param][name] for shard in work.shards])
    if work.row_axis is not None:
        pairs = [moments.strided(slot, box) for slot, box in zip(work.slots, work.boxes, strict=True)]
        work.row_index = torch.stack([row.index(device) for row, _ in pairs])
        work.col_index = torch.stack([col.index(device) for _, col in pairs])
    starts = torch.tensor([box.flat_start for box in work.boxes], device=device)
    work.starts = rounding.low_32_bits(starts)
    work.tiles = [
        replace(
            tile,
            index=None if tile.index is None else tile.index.to(device),
            relative=None if tile.relative is None else tile.relative.to(device),
        )
        for tile in work.tiles
    ]
