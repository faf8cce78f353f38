"""The way over everything: tasks, lines, tiles, samples, and where their memory is.

A program has a tile of BM lines; it goes along them BN elements at a time. Constants of this and other modules are
imported by their names: Triton's cache of compiled kernels overlooks a new value behind a module's.
"""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton.tables import (
    ADDRESS_COLUMNS,
    PIECE_FIELDS,
    Factors,
    Kept,
    Places,
    Samples,
    Task,
    piece_field,
)

FIELDS = tl.constexpr(PIECE_FIELDS)
SLOT = tl.constexpr(piece_field("slot"))
SLICE_P = tl.constexpr(piece_field("slice_p"))
SHARD = tl.constexpr(piece_field("shard"))
FIRST = tl.constexpr(piece_field("first"))
N = tl.constexpr(piece_field("n"))
INDEX = tl.constexpr(piece_field("index"))
ROW = tl.constexpr(piece_field("row"))
COL = tl.constexpr(piece_field("col"))
ROW_STEP = tl.constexpr(piece_field("row_step"))
COL_STEP = tl.constexpr(piece_field("col_step"))
INNER = tl.constexpr(piece_field("inner"))
ROW_JUMP = tl.constexpr(piece_field("row_jump"))
COL_JUMP = tl.constexpr(piece_field("col_jump"))
SIZE = tl.constexpr(piece_field("size"))
INDEX_STRIDE = tl.constexpr(piece_field("index_stride"))
ROW_STRIDE = tl.constexpr(piece_field("row_stride"))
COL_STRIDE = tl.constexpr(piece_field("col_stride"))

OF_TASK = tl.constexpr(len(Task._fields))
PIECE = tl.constexpr(Task._fields.index("piece"))
FIRST_LINE = tl.constexpr(Task._fields.index("first_line"))
LAST_LINE = tl.constexpr(Task._fields.index("last_line"))
BEGIN = tl.constexpr(Task._fields.index("begin"))
END = tl.constexpr(Task._fields.index("end"))
SAMPLE = tl.constexpr(Task._fields.index("sample"))
PARTIAL = tl.constexpr(Task._fields.index("partial"))
EVEN = tl.constexpr(Task._fields.index("even"))

ADDRESSES = tl.constexpr(len(ADDRESS_COLUMNS))
WEIGHTS = tl.constexpr(ADDRESS_COLUMNS.index("weights"))
GRADIENT = tl.constexpr(ADDRESS_COLUMNS.index("gradient"))
Z = tl.constexpr(ADDRESS_COLUMNS.index("z"))
EXP_AVG = tl.constexpr(ADDRESS_COLUMNS.index("exp_avg"))
EXP_AVG_SQ = tl.constexpr(ADDRESS_COLUMNS.index("exp_avg_sq"))
P0 = tl.constexpr(ADDRESS_COLUMNS.index("p0"))
S = tl.constexpr(ADDRESS_COLUMNS.index("s"))
PACKED_Z = tl.constexpr(ADDRESS_COLUMNS.index("packed z"))
ALIGNED = tl.constexpr(ADDRESS_COLUMNS.index("aligned"))


@triton.jit
def of_task(plan, task, FIELD: tl.constexpr):
    return tl.load(plan.tasks + task.to(tl.int64) * OF_TASK + FIELD)


@triton.jit
def piece_of(plan, task):
    return plan.pieces + of_task(plan, task, PIECE) * FIELDS


@triton.jit
def address(plan, piece, NAME: tl.constexpr):
    return tl.load(plan.addresses + tl.load(piece + SHARD) * ADDRESSES + NAME)


@triton.jit
def is_wide(plan, task):
    """Whether all of a task can be read 16 bytes at a time."""
    return of_task(plan, task, EVEN) * address(plan, piece_of(plan, task), ALIGNED) != 0


@triton.jit
def memory(plan, piece, NAME: tl.constexpr, shift, ON: tl.constexpr, WIDE: tl.constexpr):
    """Where an element of the piece is in the weights, or in what is laid out like them."""
    at, element = address(plan, piece, NAME), tl.load(piece + FIRST) + shift
    if ON.weights_in_bf16:
        pointer = at.to(tl.pointer_type(tl.bfloat16)) + element
    else:
        pointer = at.to(tl.pointer_type(tl.float32)) + element
    if WIDE:
        # Of the sum, since sums of sums are made one, and the hint is lost.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def places(plan, task, ON: tl.constexpr, WIDE: tl.constexpr):
    """Where the first element of a task is in all that is laid out like the weights."""
    piece = piece_of(plan, task)
    shift = of_task(plan, task, FIRST_LINE) * tl.load(piece + N) + of_task(plan, task, BEGIN)
    return Places(
        weights=memory(plan, piece, WEIGHTS, shift, ON, WIDE),
        gradient=memory(plan, piece, GRADIENT, shift, ON, WIDE),
        z=memory(plan, piece, Z, shift, ON, WIDE),
        exp_avg=memory(plan, piece, EXP_AVG, shift, ON, WIDE),
        exp_avg_sq=memory(plan, piece, EXP_AVG_SQ, shift, ON, WIDE),
        has_gradient=address(plan, piece, GRADIENT) != 0,
    )


@triton.jit
def _samples(plan, task, NAME: tl.constexpr, IN_BF16: tl.constexpr):
    """Where the samples of a task begin."""
    at, sample = address(plan, piece_of(plan, task), NAME), of_task(plan, task, SAMPLE)
    if IN_BF16:
        pointer = at.to(tl.pointer_type(tl.bfloat16)) + sample
    else:
        pointer = at.to(tl.pointer_type(tl.float32)) + sample
    return pointer


@triton.jit
def kept_samples(plan, task, ON: tl.constexpr):
    """Where the first sample of a task is in all that is kept of samples."""
    return Kept(
        packed=_samples(plan, task, PACKED_Z, ON.weights_in_bf16),
        p0=_samples(plan, task, P0, ON.samples_in_bf16),
        s=_samples(plan, task, S, ON.samples_in_bf16),
    )


@triton.jit
def read(pointer, offset, mask):
    """As fp32."""
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def only_if(condition, mask):
    """A mask that is empty where one condition does not hold.

    Not ``mask & condition``: of that the interpreter of Triton 3.9 makes numbers.
    """
    return tl.where(condition, mask, False)


@triton.jit
def hinted(x, WIDE: tl.constexpr):
    """A number of elements that 16 bytes divide in every dtype, where the task is wide.

    The compiler sees it from the product; a hint on an argument of a function would be lost.
    """
    if WIDE:
        x = x // 8 * 8
    return x


@triton.jit
def line_count(plan, task):
    """How many lines a task has."""
    return (of_task(plan, task, LAST_LINE) - of_task(plan, task, FIRST_LINE)).to(tl.int32)


@triton.jit
def lines_of(plan, task, row, BM: tl.constexpr):
    """Some lines of a task and which of them are there."""
    lines = of_task(plan, task, FIRST_LINE) + row + tl.arange(0, BM)
    return lines, lines < of_task(plan, task, LAST_LINE)


@triton.jit
def steps_of(plan, task, WIDE: tl.constexpr):
    """How far lines are apart, and how much of each belongs to a task: 32 bits are enough within one."""
    n = tl.load(piece_of(plan, task) + N)
    length = of_task(plan, task, END) - of_task(plan, task, BEGIN)
    return hinted(n.to(tl.int32), WIDE), hinted(length.to(tl.int32), WIDE)


@triton.jit
def tile(live, row, start, n, length, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of a task: its columns, which of them are there, where each element lies, and which are there."""
    columns = start + tl.arange(0, BN)
    inside = columns < length
    offset = (row + tl.arange(0, BM))[:, None] * n + columns[None, :]
    return columns, inside, offset, live[:, None] & inside[None, :]


@triton.jit
def along_axes(piece, lines, STRIDES: tl.constexpr, AXES: tl.constexpr):
    """What the axes before the last add to an index for each of some lines."""
    total = lines * 0
    rest = lines
    for k in tl.static_range(AXES):
        at = rest
        if k < AXES - 1:
            size = tl.load(piece + SIZE + (AXES - 1 - k))
            at = rest % size
            rest = rest // size
        total += at * tl.load(piece + STRIDES + (AXES - 1 - k))
    return total


@triton.jit
def factors(plan, task, lines, live, ON: tl.constexpr, AXES: tl.constexpr):
    """Where the factors of the lines of a task are, and those of a matrix themselves."""
    piece = piece_of(plan, task)
    row, col = tl.load(piece + ROW), tl.load(piece + COL)
    of_row, of_col = along_axes(piece, lines, ROW_STRIDE, AXES), along_axes(piece, lines, COL_STRIDE, AXES)
    by_row = tl.load(piece + ROW_STEP) == 0
    of_lines = of_row
    if ON.factored and ON.matrix:
        of_lines = tl.load(plan.factors + tl.where(by_row, row + of_row, col + of_col), mask=live, other=0.0)
    return Factors(
        of_lines=of_lines,
        along=plan.factors + tl.where(by_row, col, row) + of_task(plan, task, BEGIN),
        row=plan.factors + row,
        col=plan.factors + col,
        of_row=of_row.to(tl.int32),
        of_col=of_col.to(tl.int32),
        begin=of_task(plan, task, BEGIN).to(tl.int32),
        inner=tl.load(piece + INNER).to(tl.int32),
        row_jump=tl.load(piece + ROW_JUMP).to(tl.int32),
        row_step=tl.load(piece + ROW_STEP).to(tl.int32),
        col_jump=tl.load(piece + COL_JUMP).to(tl.int32),
        col_step=tl.load(piece + COL_STEP).to(tl.int32),
    )


@triton.jit
def root_of(at, columns, inside, mask, ON: tl.constexpr):
    """The root of the factored second moment of a tile, by its ``factors``, if it is factored."""
    root = columns
    if ON.factored and ON.matrix:
        root = at.of_lines[:, None] * tl.load(at.along + columns, mask=inside, other=0.0)[None, :]
    elif ON.factored:
        part = (at.begin + columns) // at.inner
        rest = at.begin + columns - part * at.inner
        row = at.of_row[:, None] + (part * at.row_jump + rest * at.row_step)[None, :]
        col = at.of_col[:, None] + (part * at.col_jump + rest * at.col_step)[None, :]
        root = tl.load(at.row + row, mask=mask, other=0.0) * tl.load(at.col + col, mask=mask, other=0.0)
    return root


@triton.jit
def samples(
    plan, task, lines, live, row, n, length, before, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """The samples of some lines of a task, of which so many come before; and how many come before the next lines.

    SHORT: the lines follow each other in the parameter, and a tile has all of each. Then they are one.
    """
    piece = piece_of(plan, task)
    slice_p = tl.load(piece + SLICE_P)
    if SHORT:
        first = of_task(plan, task, FIRST_LINE) + row
        length = (tl.minimum(of_task(plan, task, LAST_LINE) - first, BM)).to(tl.int32) * n
    else:
        first = lines
    index = tl.load(piece + INDEX) + along_axes(piece, first, INDEX_STRIDE, AXES) + of_task(plan, task, BEGIN)
    phase = ((slice_p - index % slice_p) % slice_p).to(tl.int32)
    slice_p = slice_p.to(tl.int32)
    count = tl.where(phase < length, (length - phase - 1) // slice_p + 1, 0)
    if SHORT:
        end = tl.where(tl.max(live.to(tl.int32), 0) != 0, length, 0)
        number, column, place, stand = tl.arange(0, BM * BS), phase, row * n, before
    else:
        count = tl.where(live, count, 0)
        number, end = tl.arange(0, BM * BS) % BS, _of_each(tl.where(live, length, 0), BM, BS)
        column, place = _of_each(phase, BM, BS), _of_each((row + tl.arange(0, BM)) * n, BM, BS)
        stand = _of_each(before + tl.cumsum(count, 0) - count, BM, BS)
        count = tl.sum(count, 0)
    of_tile = BN // slice_p
    found = Samples(slice_p=slice_p, of_tile=of_tile, number=number, column=column, place=place, stand=stand, end=end)
    return found, before + count


@triton.jit
def _of_each(of_lines, BM: tl.constexpr, BS: tl.constexpr):
    """What holds of lines, of each of BS samples of them."""
    return tl.reshape(tl.broadcast_to(of_lines[:, None], [BM, BS]), [BM * BS])


@triton.jit
def samples_of_tile(of, passed, end, SHORT: tl.constexpr):
    """Some samples of the lines of a tile that ends at a column: their places in the task, which of it they are, and
    which are there. Each line has passed so many.
    """
    number = passed + of.number
    column = of.column + number * of.slice_p
    if SHORT:
        there = column < of.end
    else:
        there = column < tl.minimum(of.end, end)
    return of.place + column, of.stand + number, there


@triton.jit
def pass_tile(of, passed, end):
    """How many samples of each line come before a column, of those that come before the tile that ends there."""
    passed += of.of_tile
    return passed + tl.where(of.column + passed * of.slice_p < end, 1, 0)
