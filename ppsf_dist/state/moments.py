"""The factored second moments of all parameters: one flat fp32 buffer, whole and equal on every rank.

Each factored parameter has its row means R and column means C somewhere in the buffer. They are tiny, so every rank
keeps all of them: then every layout is the same case, and a new layout finds them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppsf_dist.algorithm import second_moment
from ppsf_dist.algorithm.second_moment import Factoring
from ppsf_dist.sharding import Box
from ppsf_dist.state.writes import Write


@dataclass(frozen=True)
class Placed:
    """Where one parameter's R and C lie in the buffer, and how much of the tables beside it comes before its part."""

    factoring: Factoring
    row: slice
    col: slice
    rows: int
    cells: int
    ordered: int


@dataclass(frozen=True)
class Strided:
    """Elements of the buffer, as a strided view of it would say it: what a kernel is told in place of indices.

    Attributes:
        start: of the first element.
        stride: distance between neighbours along each axis, in elements.
        size: along each axis.
    """

    start: int
    stride: tuple[int, ...]
    size: tuple[int, ...]

    def index(self, device: torch.device) -> Tensor:
        """The positions one by one, in the shape of ``size``."""
        index = torch.tensor(self.start, device=device)
        for stride, n in zip(self.stride, self.size, strict=True):
            index = index.unsqueeze(-1) + torch.arange(n, device=device) * stride
        return index


class FactoredMoments:
    """The buffer and everything about it that does not change from step to step.

    Args:
        slots: for each parameter its factoring, whether its means follow the reference's axis (``quirks``), and the
            dtype in which its moments are kept; None where it is not factored.
        device: of the buffer.

    Attributes:
        placed: of each parameter, where its R and C lie.
        values: the moments.
        slot_of: of each value its parameter.
        inverse_n: what makes a mean of a sum.
        in_bf16: which values are kept in bf16; None if none is.
        rows: where the values of R lie.
        own_mean: which of those are divided by themselves (quirks).
        cell_of: by the mean of which cell the others are.
        ordered, lengths: places of the values of each cell, one cell after the other, and how many each has.
    """

    def __init__(
        self, slots: Sequence[tuple[Factoring, bool, torch.dtype] | None], device: torch.device | None
    ) -> None:
        self.placed: list[Placed | None] = []
        slot_of, inverse_n, low_precision = [], [], []
        ordered, lengths, cell_of, own_mean, row_index = [], [], [], [], []
        start = cells = rows_before = ordered_before = 0
        for index, slot in enumerate(slots):
            if slot is None:
                self.placed.append(None)
                continue
            axes, quirks, dtype = slot
            rows, cols = math.prod(axes.row_shape), math.prod(axes.col_shape)
            row, col = slice(start, start + rows), slice(start + rows, start + rows + cols)
            self.placed.append(Placed(axes, row, col, rows_before, cells, ordered_before))
            slot_of.append(torch.full((rows + cols,), index))
            inverse_n.append(torch.full((rows,), 1 / axes.shape[axes.dr]))
            inverse_n.append(torch.full((cols,), 1 / axes.shape[axes.dc]))
            low_precision.append(torch.full((rows + cols,), dtype == torch.bfloat16))
            index_of_row = torch.arange(start, start + rows).view(axes.row_shape)
            row_index.append(index_of_row.reshape(-1))
            mean_axis = axes.mean_axis(quirks=quirks)
            n = axes.row_shape[mean_axis]
            by_cell = index_of_row.movedim(mean_axis, -1).reshape(-1, n)
            own_mean.append(torch.full((rows,), n == 1))
            cell_shape = [1 if a == mean_axis else size for a, size in enumerate(axes.row_shape)]
            if n == 1:
                cell_of.append(torch.zeros(rows, dtype=torch.int64))
            else:
                cell = torch.arange(cells, cells + len(by_cell)).view(cell_shape).expand(axes.row_shape)
                cell_of.append(cell.reshape(-1))
                ordered.append(by_cell.reshape(-1))
                lengths.append(torch.full((len(by_cell),), n))
                cells += len(by_cell)
                ordered_before += by_cell.numel()
            start += rows + cols
            rows_before += rows

        def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            return (torch.cat(parts) if parts else torch.empty(0)).to(dtype=dtype, device=device)

        self.values = torch.zeros(start, dtype=torch.float32, device=device)
        self.slot_of = joined(slot_of, torch.int64)
        self.inverse_n = joined(inverse_n, torch.float32)
        any_low = any(slot is not None and slot[2] == torch.bfloat16 for slot in slots)
        self.in_bf16 = joined(low_precision, torch.bool) if any_low else None
        self.rows = joined(row_index, torch.int64)
        self.own_mean = joined(own_mean, torch.bool)
        self.cell_of = joined(cell_of, torch.int64)
        self.ordered = joined(ordered, torch.int64)
        self.lengths = joined(lengths, torch.int64)

    def __len__(self) -> int:
        return self.values.numel()

    def updated(self, sums: Tensor, beta2: Tensor, weight: Tensor) -> Tensor:
        """The moments after this step, into new memory.

        Args:
            sums: sums of g^2 over dr and dc of the whole parameters, in the order of the buffer.
            beta2, weight: decay of the moment and weight of the square, vectors over parameters (fp32).
        """
        square = sums * self.inverse_n
        beta2, weight = beta2[self.slot_of], weight[self.slot_of]
        new = second_moment.ema_(self.values.clone(), beta2, weight, square)
        if self.in_bf16 is not None:
            low = second_moment.ema_low_precision(self.values.bfloat16(), beta2, weight, square).float()
            new = torch.where(self.in_bf16, low, new)
        return new

    def factors(self, moments: Tensor) -> Tensor:
        """Square roots that multiply to the denominator: sqrt(R / mean R) at the rows, sqrt(C) at the columns."""
        factors = moments.sqrt()
        rows = moments.index_select(0, self.rows)
        if self.lengths.numel():
            by_cell = moments.index_select(0, self.ordered).double()
            means = torch.segment_reduce(by_cell, "mean", lengths=self.lengths, unsafe=True).float()
            mean = torch.where(self.own_mean, rows, means.index_select(0, self.cell_of))
        else:
            mean = rows
        return factors.index_copy_(0, self.rows, second_moment.row_scale(rows, mean))

    def strided(self, slot: int, box: Box) -> tuple[Strided, Strided]:
        """Where the rows and the columns that a box touches lie in the buffer, in the box's shape (1 along dr, dc)."""
        placed = self.placed[slot]
        assert placed is not None
        axes = placed.factoring

        def of(shape: tuple[int, ...], kept: slice, collapsed: int) -> Strided:
            strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            offset = [0 if axis == collapsed else start for axis, start in enumerate(box.offset)]
            size = tuple(1 if axis == collapsed else n for axis, n in enumerate(box.size))
            first = kept.start + sum(start * stride for start, stride in zip(offset, strides, strict=True))
            return Strided(first, tuple(strides), size)

        return of(axes.row_shape, placed.row, axes.dr), of(axes.col_shape, placed.col, axes.dc)

    def committed(self, new: Tensor, gate: Tensor) -> list[Write]:
        """The moments with those of the parameters whose gate (bool vector over parameters) is open taken over."""
        if not len(self):
            return []
        return [Write([self.values], [torch.where(gate[self.slot_of], new, self.values)])]
