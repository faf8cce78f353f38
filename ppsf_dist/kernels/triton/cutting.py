"""How pieces are cut into the tasks of programs, and which of them are launched together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ppsf_dist.kernels.codes import MOST_AXES, Flag, Piece
from ppsf_dist.kernels.triton.tables import Columns, On, Task
from ppsf_dist.sharding import Shard
from ppsf_dist.state.moments import FactoredMoments

OF_A_LINE = 8192
"""Elements of a task that is a part of one line."""

OF_SHORT_LINES = 32768
"""At most so many elements has a task of several tiles; those of long lines are one tile high."""

MOST_OF_TASK, MOST_APART = 2**30, 2**20
"""Elements of a task, and from one sample to the next: programs count both in 32 bits."""

IN_16_BYTES = 8
"""Elements of the shortest dtype."""


class Tile(NamedTuple):
    """Lines and elements along them that a program has in its registers: 2048, or 1024 of what is short."""

    lines: int
    along: int


LINE = Tile(1, 1024)
WIDE, FLAT = Tile(32, 64), Tile(16, 128)
NARROW = (Tile(128, 16), Tile(64, 32), Tile(32, 64))
SMALL = Tile(16, 64)


class Steps(NamedTuple):
    """How a kernel goes along a tile, as measured on an H200.

    Attributes:
        of_thread: elements of a thread.
        registers: of a thread at most, on GPUs of NVIDIA. More programs at once are worth more than what is kept in
            memory for it.
    """

    of_thread: int
    registers: int


MOST_REGISTERS = 128
STEPS = {
    # Sums along a tile go through memory from warp to warp: few warps.
    "pass_1": Steps(of_thread=32, registers=168),
    "pass_2": Steps(of_thread=8, registers=40),
    "count_masks": Steps(of_thread=8, registers=128),
    "pass_3": Steps(of_thread=8, registers=80),
    "pack": Steps(of_thread=8, registers=64),
}


class Variant(NamedTuple):
    """What the tasks of a launch share: everything that a kernel is compiled for.

    Attributes:
        apart: so many elements at least are between two samples.
        short: lines follow each other in the parameter, and a tile has all of each.
    """

    on: On
    axes: int
    tile: Tile
    apart: int
    short: bool

    def launched(self, kernel: str) -> tuple[int, int]:
        """Warps, and registers of a thread at most."""
        steps = STEPS[kernel]
        # Formulas that are longer or move more have the registers for it.
        plain = self.on.factored and self.on.schedulefree and not (self.on.cautious or self.on.grams or self.on.atan2)
        registers = steps.registers if plain else max(steps.registers, MOST_REGISTERS)
        return self.tile.lines * self.tile.along // (32 * steps.of_thread), registers


class Launch(NamedTuple):
    """Tasks of one variant that follow each other."""

    variant: Variant
    first: int
    tasks: int


@dataclass
class Cut:
    """The tasks of a plan.

    Attributes:
        tasks: variant by variant, and round by round within each.
        launches: of each variant.
        rounds: of each round and variant: tasks of different rounds may add to the same row or column.
        columns: of each round, the sums along the lines of its matrices.
        partial: how many floats these need while they wait.
        slots: of each task its parameter.
    """

    tasks: list[Task] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    rounds: list[list[Launch]] = field(default_factory=list)
    columns: list[list[Columns]] = field(default_factory=list)
    partial: int = 0
    slots: list[int] = field(default_factory=list)


def tile_of(piece: Piece) -> Tile:
    """The tile that wastes least of a piece, among a few."""
    if piece.lines == 1 or piece.n * WIDE.lines > MOST_OF_TASK:
        return LINE
    if piece.n > SMALL.along:
        return WIDE if piece.lines > FLAT.lines else FLAT
    if piece.lines <= SMALL.lines:
        return SMALL
    return next(tile for tile in NARROW if piece.n <= tile.along)


def variant_of(piece: Piece) -> Variant:
    apart = max(of for of in (1, 2, 4, 8) if of == 1 or of <= piece.slice_p)
    on, tile = On.of(piece.flags), tile_of(piece)
    return Variant(on, piece.axes, tile, apart, on.flat and piece.n <= tile.along)


def only_whole_matrices(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Take the flag MATRIX from factored pieces of boxes that are not all matrices.

    Returns:
        Shard and number of each such box: their rows and columns are summed apart.
    """
    factored = [piece for piece in pieces if piece.flags & Flag.FACTORED]
    odd = {(piece.shard, piece.round) for piece in factored if not piece.flags & Flag.MATRIX}
    for piece in pieces:
        if (piece.shard, piece.round) in odd or not piece.flags & Flag.FACTORED:
            piece.flags &= ~int(Flag.MATRIX)
    return sorted({(p.shard, p.round) for p in factored if (p.shard, p.round) in odd and p.flags & Flag.OWNED})


def cut(pieces: Sequence[Piece]) -> Cut:
    """Cut pieces into tasks, from their shapes alone."""
    found = Cut()
    order = sorted(range(len(pieces)), key=lambda i: (variant_of(pieces[i]), pieces[i].round, i))
    rounds = sorted({piece.round for piece in pieces})
    launches: dict[int, list[Launch]] = {number: [] for number in rounds}
    columns: dict[int, list[Columns]] = {number: [] for number in rounds}
    for variant, of_variant in groupby(order, key=lambda i: variant_of(pieces[i])):
        start = len(found.tasks)
        for number, of_round in groupby(of_variant, key=lambda i: pieces[i].round):
            before = len(found.tasks)
            for index in of_round:
                column = _cut_piece(found, pieces[index], index, variant)
                columns[number] += [] if column is None else [column]
            launches[number].append(Launch(variant, before, len(found.tasks) - before))
        found.launches.append(Launch(variant, start, len(found.tasks) - start))
    found.rounds, found.columns = list(launches.values()), list(columns.values())
    return found


def _cut_piece(found: Cut, piece: Piece, index: int, variant: Variant) -> Columns | None:
    """Add the tasks of a piece; the sums along its lines, if it is a matrix that is summed."""
    sums = variant.on.matrix and variant.on.owned
    lines, n, p = piece.lines, piece.n, piece.slice_p
    step = n if lines > 1 or sums else OF_A_LINE
    for what, value, most in ((f"lines of {n} elements", step, MOST_OF_TASK), (f"slice_p={p}", p, MOST_APART)):
        if value > most:
            raise ValueError(f"{what}: Triton's kernels count up to {most}; set PPSF_KERNELS=eager for more")
    height = variant.tile.lines * max(1, OF_SHORT_LINES // max(1, variant.tile.lines * n))
    ranges = [
        (first, min(first + height, lines), begin, min(begin + step, n))
        for first in range(0, lines, height)
        for begin in range(0, n, step)
    ]
    samples = _samples_before(piece, ranges)
    column = None
    if sums:
        column = Columns(piece.row if piece.row_step else piece.col, n, found.partial, -(-lines // variant.tile.lines))
    for (first, last, begin, end), sample in zip(ranges, samples, strict=True):
        even = (lines == 1 or n % IN_16_BYTES == 0) and not (begin | end | piece.first) % IN_16_BYTES
        found.tasks.append(Task(index, first, last, begin, end, sample, found.partial if sums else 0, int(even)))
        found.slots.append(piece.slot)
        found.partial += n * -(-(last - first) // variant.tile.lines) if sums else 0
    return column


def _samples_before(piece: Piece, ranges: Sequence[tuple[int, int, int, int]]) -> list[int]:
    """Where the first sample of each range of a piece stands among those of the shard."""
    p = piece.slice_p

    def before(index: Tensor) -> Tensor:
        """How many samples of the parameter come before an element."""
        return torch.div(index + (p - 1), p, rounding_mode="floor")

    firsts = torch.tensor([first for first, _, _, _ in ranges])
    begins = torch.tensor([begin for _, _, begin, _ in ranges])
    if piece.flags & Flag.FLAT:
        start = before(torch.tensor(piece.index))
        found: Tensor = before(piece.index + firsts * piece.n + begins) - start
    else:
        rest = torch.arange(piece.lines)
        index = torch.full_like(rest, piece.index)
        for axis in range(piece.axes - 1, -1, -1):
            index += (rest % piece.size[axis] if axis else rest) * piece.index_stride[axis]
            rest //= piece.size[axis]
        of_line = before(index + piece.n) - before(index)
        of_lines = torch.cat((torch.zeros(1, dtype=torch.int64), of_line.cumsum(0)))
        found = of_lines[firsts] + before(index[firsts] + begins) - before(index[firsts])
    return [piece.first_sample + count for count in found.tolist()]


def vectors_of(
    boxes: Sequence[tuple[int, int]], shards: Sequence[Shard], slots: Sequence[int], moments: FactoredMoments
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """R and C of the parameters that have a box which is no matrix.

    Args:
        boxes: shard and number of each, sorted.
        shards, slots: of the plan.
        moments: know where R and C lie.

    Returns:
        Rows of the tables of vectors and of boxes, and the length of each vector.
    """
    vectors: list[list[int]] = []
    rows: list[list[int]] = []
    lengths: list[int] = []
    for shard, of_shard in groupby(boxes, key=lambda pair: pair[0]):
        first, whole = len(rows), shards[shard]
        starts = [0]
        for box in whole.boxes:
            starts.append(starts[-1] + box.numel)
        for _, number in of_shard:
            box = whole.boxes[number]
            half = int(whole.weights().dtype == torch.bfloat16)
            rows.append([shard, half, starts[number], *_padded(box.offset, 0), *_padded(box.size, 1)])
        placed = moments.placed[slots[shard]]
        assert placed is not None
        front = MOST_AXES - len(whole.shape)
        for where, axis in ((placed.row, placed.factoring.dr), (placed.col, placed.factoring.dc)):
            vectors.append([where.start, front + axis, first, len(rows), *_padded(whole.shape, 1)])
            lengths.append(where.stop - where.start)
    return vectors, rows, lengths


def _padded(values: Sequence[int], with_: int) -> list[int]:
    return [with_] * (MOST_AXES - len(values)) + list(values)
