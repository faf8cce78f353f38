"""Where the elements of a shard lie in the logical parameter.

Everything is a box: a range on each axis of the logical shape. A shard made of whole rows is one box; a contiguous
range of the flattened parameter (every ZeRO slice) is a few of them. Indices are those of the logical parameter,
row-major, whatever the memory format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Shape = tuple[int, ...]


def row_major_strides(shape: Sequence[int]) -> Shape:
    """Distance in the flattened parameter between neighbours on each axis."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


@dataclass(frozen=True)
class Box:
    """The elements ``offset[i] <= index[i] < offset[i] + size[i]`` of a parameter of the given logical ``shape``."""

    shape: Shape
    offset: Shape
    size: Shape

    @cached_property
    def numel(self) -> int:
        return math.prod(self.size)

    @cached_property
    def flat_start(self) -> int:
        """Index of the first element in the flattened parameter."""
        return sum(o * s for o, s in zip(self.offset, row_major_strides(self.shape), strict=True))

    @cached_property
    def is_flat(self) -> bool:
        """True if the box is one contiguous range of the flattened parameter."""
        if self.numel <= 1:
            return True
        first = next(axis for axis, n in enumerate(self.size) if n > 1)
        return self.size[first + 1 :] == self.shape[first + 1 :]

    def narrow(self, start: Shape, size: Shape) -> Box:
        """The box at ``start`` (relative to this one) of the given size."""
        return Box(self.shape, tuple(o + s for o, s in zip(self.offset, start, strict=True)), size)

    def flat_index(self, device: torch.device | None = None) -> Tensor:
        """Indices in the flattened parameter of the box's elements, in the box's order (int64)."""
        index = torch.zeros((), dtype=torch.int64, device=device)
        strides = row_major_strides(self.shape)
        for axis, (start, n) in enumerate(zip(self.offset, self.size, strict=True)):
            along = torch.arange(start, start + n, device=device) * strides[axis]
            index = index + along.view([-1 if a == axis else 1 for a in range(len(self.size))])
        return index.reshape(-1)

    def tiles(self, limit: int) -> Iterator[tuple[Shape, Shape]]:
        """Cut into boxes of at most ``limit`` elements, as (start, size) relative to this one.

        Cuts along the leading axes only, so a tile of a flat box is flat.
        """
        if self.numel <= limit:
            yield (0,) * len(self.size), self.size
            return
        axis, inner = 0, self.numel // self.size[0]
        while inner > limit:
            axis += 1
            inner //= self.size[axis]
        step = max(1, limit // inner)
        for lead in _indices(self.size[:axis]):
            for start in range(0, self.size[axis], step):
                rows = min(step, self.size[axis] - start)
                rest = len(self.size) - axis - 1
                yield (*lead, start) + (0,) * rest, (1,) * axis + (rows,) + self.size[axis + 1 :]


def _indices(size: Shape) -> Iterator[Shape]:
    if not size:
        yield ()
        return
    for head in range(size[0]):
        for rest in _indices(size[1:]):
            yield (head, *rest)


def chunk(n: int, parts: int, index: int) -> tuple[int, int]:
    """Offset and size of one part of an axis of ``n`` elements, in the manner of ``torch.chunk``."""
    size = -(-n // parts)
    start = min(size * index, n)
    return start, min(size * (index + 1), n) - start


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole parameter."""
    return Box(tuple(shape), (0,) * len(shape), tuple(shape))


def flat_range(shape: Sequence[int], start: int, numel: int) -> list[Box]:
    """Cut the range ``[start, start + numel)`` of the flattened parameter into boxes, in order.

    A range of a matrix gives up to three: the end of a row, whole rows, the beginning of a row.

    Raises:
        ValueError: the range does not lie in the parameter.
    """
    shape = tuple(shape)
    total = math.prod(shape)
    if start < 0 or numel < 0 or start + numel > total:
        raise ValueError(f"range [{start}, {start + numel}) does not lie in a parameter of shape {shape} ({total})")
    return [Box(shape, offset, size) for offset, size in _cut(shape, start, numel)]


def _cut(shape: Shape, start: int, numel: int) -> list[tuple[Shape, Shape]]:
    if numel == 0:
        return []
    if len(shape) <= 1:
        return [((start,), (numel,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    boxes: list[tuple[Shape, Shape]] = []
    end = start + numel
    while start < end:
        index, inside = divmod(start, row)
        if inside == 0 and end - start >= row:
            rows = (end - start) // row
            boxes.append(((index,) + (0,) * (len(shape) - 1), (rows,) + shape[1:]))
            start += rows * row
        else:
            stop = min(end, (index + 1) * row)
            boxes += [((index, *offset), (1, *size)) for offset, size in _cut(shape[1:], inside, stop - start)]
            start = stop
    return boxes
