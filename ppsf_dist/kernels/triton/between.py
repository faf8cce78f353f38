"""What lies between the passes: partial sums into the tables of the engine, and the factored moments."""

import triton
import triton.language as tl

from ppsf_dist.kernels import codes
from ppsf_dist.kernels.triton import formulas, walk
from ppsf_dist.kernels.triton.tables import BOX_FIELDS, COLUMN_FIELDS, VECTOR_FIELDS
from ppsf_dist.kernels.triton.walk import ADDRESSES, GRADIENT

OF_COLUMNS = tl.constexpr(COLUMN_FIELDS)
OF_VECTOR = tl.constexpr(VECTOR_FIELDS)
OF_BOX = tl.constexpr(BOX_FIELDS)
MOST_AXES = tl.constexpr(codes.MOST_AXES)
ROW_MEAN_GUARD = tl.constexpr(1e-30)


@triton.jit
def add_columns(plan, columns, blocks, BT: tl.constexpr, BN: tl.constexpr):
    """Sums along the lines of a matrix: those of its tiles, in order.

    A row of ``columns`` is where they go, how many there are, where those of the first tile wait, and how many tiles.
    """
    block = blocks + tl.program_id(0).to(tl.int64) * 2
    of = columns + tl.load(block) * OF_COLUMNS
    at, n, partial, tiles = tl.load(of), tl.load(of + 1), tl.load(of + 2), tl.load(of + 3)
    j = tl.load(block + 1) + tl.arange(0, BN)
    inside = j < n
    total = tl.zeros([BN], tl.float64)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        mask = (t < tiles)[:, None] & inside[None, :]
        parts = tl.load(plan.partial + partial + t[:, None].to(tl.int64) * n + j[None, :], mask=mask, other=0.0)
        total += tl.sum(parts.to(tl.float64), 0)
    before = tl.load(plan.sums + at + j, mask=inside, other=0.0)
    tl.store(plan.sums + at + j, (before.to(tl.float64) + total).to(tl.float32), mask=inside)


@triton.jit
def add_results(plan, table, slots, firsts, order, SUMS: tl.constexpr, COUNT: tl.constexpr, BT: tl.constexpr):
    """One sum of a parameter's tasks, in order, into its row of a table."""
    k, number = tl.program_id(0) // COUNT, tl.program_id(0) % COUNT
    sum_ = number * 0
    for index in tl.static_range(COUNT):
        sum_ = tl.where(number == index, SUMS[index], sum_)
    first, last = tl.load(firsts + k), tl.load(firsts + k + 1)
    results = plan.results + sum_ * tl.load(plan.sizes + 1)
    total = tl.zeros([BT], tl.float64)
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        total += tl.load(results + tl.load(order + t, mask=t < last, other=0), mask=t < last, other=0.0)
    at = table + tl.load(slots + k) * tl.load(plan.sizes + 2) + tl.load(plan.sizes + 3) + sum_
    tl.store(at, tl.load(at) + tl.sum(total))


@triton.jit
def add_vectors(plan, vectors, boxes, blocks, BLOCK: tl.constexpr):
    """Sums of squares over one axis of a parameter that is no matrix, of every box that this rank has of it.

    A row of ``vectors`` is where they go, the axis, the boxes from and to, and the shape of the parameter; one of
    ``boxes`` the shard, whether that is in bf16, the place of its first element in it, offset and size.
    """
    block = blocks + tl.program_id(0).to(tl.int64) * 2
    of = vectors + tl.load(block) * OF_VECTOR
    dest, axis = tl.load(of), tl.load(of + 1)
    i = tl.load(block + 1) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    count = dest * 0 + 1
    for k in tl.static_range(MOST_AXES):
        count *= tl.where(axis == k, 1, tl.load(of + 4 + k))
    for b in range(tl.load(of + 2), tl.load(of + 3)):
        box = boxes + b * OF_BOX
        rest, inside = i, i < count
        offset, stride, step, length = i * 0, dest * 0 + 1, dest * 0, dest * 0
        for k in tl.static_range(MOST_AXES):
            here = axis == (MOST_AXES - 1 - k)
            extent = tl.where(here, 1, tl.load(of + 4 + (MOST_AXES - 1 - k)))
            begin, size = tl.load(box + 3 + (MOST_AXES - 1 - k)), tl.load(box + 3 + MOST_AXES + (MOST_AXES - 1 - k))
            at = rest % extent
            rest = rest // extent
            inside = tl.where(here, inside, inside & (at >= begin) & (at < begin + size))
            offset += tl.where(here, 0, (at - begin) * stride)
            step += tl.where(here, stride, 0)
            length += tl.where(here, size, 0)
            stride *= size
        address = tl.load(plan.addresses + tl.load(box) * ADDRESSES + GRADIENT)
        half, inside = tl.load(box + 1) != 0, walk.only_if(address != 0, inside)
        at = tl.load(box + 2) + offset
        for along in range(0, length):
            if half:
                g = walk.read(address.to(tl.pointer_type(tl.bfloat16)), at + along * step, inside)
            else:
                g = walk.read(address.to(tl.pointer_type(tl.float32)), at + along * step, inside)
            total += (g * g).to(tl.float64)
    there = i < count
    before = tl.load(plan.sums + dest + i, mask=there, other=0.0)
    tl.store(plan.sums + dest + i, (before.to(tl.float64) + total).to(tl.float32), mask=there)


@triton.jit(do_not_specialize=["count"])
def update_moments(
    plan, moments, after, count, ROWS: tl.constexpr, BLOCK: tl.constexpr, ANY_BF16: tl.constexpr
):  # fmt: skip
    """The factored moments after the step, beside the old ones."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    slot = tl.load(moments.slot_of + i, mask=mask, other=0)
    square = tl.load(plan.sums + i, mask=mask, other=0.0) * tl.load(moments.inverse_n + i, mask=mask, other=0.0)
    beta2, weight = formulas.number(plan, slot, ROWS.beta2), formulas.number(plan, slot, ROWS.square_weight)
    old = tl.load(moments.kept + i, mask=mask, other=0.0)
    new = formulas.ema(old, beta2, weight, square, False)
    if ANY_BF16:
        halved = tl.load(moments.in_bf16 + i, mask=mask, other=0) != 0
        new = tl.where(halved, formulas.ema(old, beta2, weight, square, True), new)
    tl.store(after + i, new, mask=mask)


@triton.jit
def average_cells(moments, means, starts, BLOCK: tl.constexpr):
    """The mean of each cell of R, summed in order."""
    cell = tl.program_id(0)
    first, last = tl.load(starts + cell), tl.load(starts + cell + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = tl.load(moments.ordered + k, mask=k < last, other=0)
        total += tl.load(moments.of_factors + at, mask=k < last, other=0.0).to(tl.float64)
    tl.store(means + cell, (tl.sum(total) / (last - first).to(tl.float64)).to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def fill_roots(plan, moments, count, BLOCK: tl.constexpr):
    """Square roots of all moments."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    tl.store(plan.factors + i, tl.sqrt_rn(tl.load(moments.of_factors + i, mask=mask, other=0.0)), mask=mask)


@triton.jit(do_not_specialize=["count"])
def scale_rows(plan, moments, means, count, BLOCK: tl.constexpr, ANY_CELLS: tl.constexpr):
    """Square roots of R divided by its mean, in place of those of R."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = k < count
    at = tl.load(moments.rows + k, mask=mask, other=0)
    row = tl.load(moments.of_factors + at, mask=mask, other=1.0)
    mean = row
    if ANY_CELLS:
        own = tl.load(moments.own_mean + k, mask=mask, other=1) != 0
        cell = tl.load(moments.cell_of + k, mask=mask, other=0)
        mean = tl.where(own, row, tl.load(means + cell, mask=mask & (own == 0), other=1.0))
    tl.store(plan.factors + at, tl.sqrt_rn(tl.div_rn(row, mean + ROW_MEAN_GUARD)), mask=mask)


@triton.jit(do_not_specialize=["count"])
def write_moments(plan, moments, after, count, BLOCK: tl.constexpr):
    """Those of the parameters whose gate is open. Twice is once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    slot = tl.load(moments.slot_of + i, mask=mask, other=0)
    open_ = tl.load(plan.moments_gate + slot, mask=mask, other=0) != 0
    tl.store(moments.kept + i, tl.load(after + i, mask=mask, other=0.0), mask=mask & open_)
