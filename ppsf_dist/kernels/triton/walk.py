"""The way over everything: tasks, lines, tiles, samples, and where their memory is.

A program has a tile of BM lines; it goes along them BN elements at a time. Constants of this and other modules are
imported by their names: Triton's cache of compiled kernels overlooks a new value behind a module's.
"""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton.tables import ADDRESS_COLUMNS, PIECE_FIELDS, Task, piece_field

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
def memory(plan, piece, NAME: tl.constexpr, ON: tl.constexpr, WIDE: tl.constexpr):
    """Where the piece begins in the weights, or in what is laid out like them."""
    at = address(plan, piece, NAME)
    if ON.weights_in_bf16:
        pointer = at.to(tl.pointer_type(tl.bfloat16)) + tl.load(piece + FIRST)
    else:
        pointer = at.to(tl.pointer_type(tl.float32)) + tl.load(piece + FIRST)
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def samples(plan, piece, NAME: tl.constexpr, IN_BF16: tl.constexpr):
    """Where the samples of the shard begin."""
    at = address(plan, piece, NAME)
    if IN_BF16:
        pointer = at.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = at.to(tl.pointer_type(tl.float32))
    return pointer


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
def lines_of(plan, task, BM: tl.constexpr):
    """The lines of a task and which of them are there."""
    lines = of_task(plan, task, FIRST_LINE) + tl.arange(0, BM)
    return lines, lines < of_task(plan, task, LAST_LINE)


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
def root_of(plan, piece, lines, columns, live, inside, ON: tl.constexpr, AXES: tl.constexpr):
    """The root of the factored second moment of a tile."""
    row = tl.load(piece + ROW) + along_axes(piece, lines, ROW_STRIDE, AXES)
    col = tl.load(piece + COL) + along_axes(piece, lines, COL_STRIDE, AXES)
    if ON.matrix:
        by_row = tl.load(piece + ROW_STEP) == 0
        along = tl.where(by_row, tl.load(piece + COL), tl.load(piece + ROW))
        of_line = tl.load(plan.factors + tl.where(by_row, row, col), mask=live, other=0.0)
        root = of_line[:, None] * tl.load(plan.factors + along + columns, mask=inside, other=0.0)[None, :]
    else:
        part = columns // tl.load(piece + INNER)
        rest = columns - part * tl.load(piece + INNER)
        of_row = part * tl.load(piece + ROW_JUMP) + rest * tl.load(piece + ROW_STEP)
        of_col = part * tl.load(piece + COL_JUMP) + rest * tl.load(piece + COL_STEP)
        mask = live[:, None] & inside[None, :]
        r = tl.load(plan.factors + row[:, None] + of_row[None, :], mask=mask, other=0.0)
        root = r * tl.load(plan.factors + col[:, None] + of_col[None, :], mask=mask, other=0.0)
    return root


@triton.jit
def stretches(plan, task, ON: tl.constexpr):
    """How many times the elements of a task follow each other in the flattened parameter."""
    count = of_task(plan, task, LAST_LINE) - of_task(plan, task, FIRST_LINE)
    if ON.flat:
        count = count * 0 + 1
    return count


@triton.jit
def stretch(plan, task, piece, k, ON: tl.constexpr, AXES: tl.constexpr):
    """The samples of one of them: where the first stands among the elements of the piece, and how many there are."""
    line = of_task(plan, task, FIRST_LINE) + k
    begin, slice_p = of_task(plan, task, BEGIN), tl.load(piece + SLICE_P)
    length = of_task(plan, task, END) - begin
    if ON.flat:
        length += (of_task(plan, task, LAST_LINE) - line - 1) * tl.load(piece + N)
    index = tl.load(piece + INDEX) + along_axes(piece, line, INDEX_STRIDE, AXES) + begin
    phase = (slice_p - index % slice_p) % slice_p
    return line * tl.load(piece + N) + begin + phase, (length - phase + slice_p - 1) // slice_p
