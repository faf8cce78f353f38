"""The passes of ``ppsf_dist.kernels.interface`` over the tasks of a launch, which share everything in capitals.

ON: the formulas. ROWS: where each coefficient stands. AXES: of the lines of a piece. BM, BN: the tile. BS: samples at
once. Programs share no place that they write to, so that sums come in one order and every run has the same d.
"""

import triton
import triton.language as tl

from ppsf_dist.kernels.codes import Sum
from ppsf_dist.kernels.triton import element, formulas, walk
from ppsf_dist.kernels.triton.walk import (
    BEGIN,
    COL,
    COL_STRIDE,
    END,
    EXP_AVG,
    EXP_AVG_SQ,
    GRADIENT,
    INDEX,
    INDEX_STRIDE,
    P0,
    PACKED_Z,
    PARTIAL,
    ROW,
    ROW_STEP,
    ROW_STRIDE,
    SAMPLE,
    SLICE_P,
    SLOT,
    WEIGHTS,
    N,
    S,
    Z,
)

LARGEST_SQUARE = tl.constexpr(int(Sum.LARGEST_SQUARE))
DOT = tl.constexpr(int(Sum.DOT))
S_L1 = tl.constexpr(int(Sum.S_L1))
DELTA_L1 = tl.constexpr(int(Sum.DELTA_L1))
DELTA_SQUARE = tl.constexpr(int(Sum.DELTA_SQUARE))
EARLY_MASK = tl.constexpr(int(Sum.EARLY_MASK))
UU = tl.constexpr(int(Sum.UU))
LATE_MASK = tl.constexpr(int(Sum.LATE_MASK))
GG = tl.constexpr(int(Sum.GG))


@triton.jit
def keep(plan, task, SUM: tl.constexpr, value):
    """One sum of a task."""
    tl.store(plan.results + SUM * tl.load(plan.sizes + 1) + task, value)


@triton.jit
def gradient(plan, piece, at, y_at, offset, mask, slot, ROWS: tl.constexpr, ON: tl.constexpr):
    """Zeros where there is none; with the weights in it, where they decay so."""
    g = walk.read(at, offset, walk.only_if(walk.address(plan, piece, GRADIENT) != 0, mask))
    if ON.coupled_decay:
        g = walk.read(y_at, offset, mask) * formulas.number(plan, slot, ROWS.weight_decay) + g
    return g


@triton.jit
def _tile(lines, live, start, end, n, BN: tl.constexpr, WIDE: tl.constexpr):
    """The elements of a tile: where each lies, which of them are there, and their columns."""
    columns = start + tl.arange(0, BN)
    inside = columns < end
    return columns, inside, lines[:, None] * n + columns[None, :], live[:, None] & inside[None, :]


@triton.jit(do_not_specialize=["first"])
def pass_1(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a task, by row and column of a matrix, and all sums that need nothing of this step."""
    task = first + tl.program_id(0)
    if walk.is_wide(plan, task):
        _sum_squares(plan, task, ON, ROWS, AXES, BM, BN, True)
    else:
        _sum_squares(plan, task, ON, ROWS, AXES, BM, BN, False)
    if ON.statistics and ON.owned:
        _sum_samples(plan, task, ON, ROWS, AXES, BS)


@triton.jit
def _sum_squares(
    plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    piece = walk.piece_of(plan, task)
    slot, n = tl.load(piece + SLOT), walk.hinted(tl.load(piece + N), WIDE)
    lines, live = walk.lines_of(plan, task, BM)
    end = walk.hinted(walk.of_task(plan, task, END), WIDE)
    g_at, y_at = walk.memory(plan, piece, GRADIENT, ON, WIDE), walk.memory(plan, piece, WEIGHTS, ON, WIDE)
    m_at = walk.memory(plan, piece, EXP_AVG, ON, WIDE)
    squares, most = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.int32)
    agree = tl.zeros([BM, BN], tl.int32)
    for start in range(walk.hinted(walk.of_task(plan, task, BEGIN), WIDE), end, BN):
        columns, inside, offset, mask = _tile(lines, live, start, end, n, BN, WIDE)
        g = gradient(plan, piece, g_at, y_at, offset, mask, slot, ROWS, ON)
        square = g * g
        squares += square
        if ON.matrix and ON.owned:
            along = plan.partial + walk.of_task(plan, task, PARTIAL) + columns
            tl.store(along, tl.sum(square, 0), mask=inside)
        else:
            most = tl.maximum(most, (element.bits_of(square) & 0x7FFFFFFF).to(tl.int32))
        if ON.cautious and not ON.schedulefree and ON.owned:
            m = formulas.momentum(g, walk.read(m_at, offset, mask), plan, slot, ROWS, ON)
            agree += tl.where(mask & (g * m > 0), 1, 0)
    if ON.matrix and ON.owned:
        _keep_lines(plan, task, piece, lines, live, tl.sum(squares, 1), AXES)
    else:
        largest = element.largest_of(most)
        if ON.owned:
            keep(plan, task, LARGEST_SQUARE, largest)
            keep(plan, task, GG, element.total(squares))
        else:
            # A replica adds nothing, unless its gradient is not finite.
            keep(plan, task, LARGEST_SQUARE, tl.where(largest - largest == 0, 0.0, largest))
            keep(plan, task, GG, 0.0)
    if ON.cautious and not ON.schedulefree and ON.owned:
        keep(plan, task, EARLY_MASK, element.total(agree))


@triton.jit
def _keep_lines(plan, task, piece, lines, live, of_line, AXES: tl.constexpr):
    """Sums of squares of the lines of a matrix, each of which is a row or a column."""
    row = tl.load(piece + ROW) + walk.along_axes(piece, lines, ROW_STRIDE, AXES)
    col = tl.load(piece + COL) + walk.along_axes(piece, lines, COL_STRIDE, AXES)
    at = plan.sums + tl.where(tl.load(piece + ROW_STEP) == 0, row, col)
    tl.store(at, tl.load(at, mask=live, other=0.0) + of_line, mask=live)
    bits = (element.bits_of(of_line) & 0x7FFFFFFF).to(tl.int32)
    keep(plan, task, LARGEST_SQUARE, element.largest_of(bits))
    keep(plan, task, GG, element.total(of_line))


@triton.jit
def _sum_samples(plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BS: tl.constexpr):
    piece = walk.piece_of(plan, task)
    slot, slice_p = tl.load(piece + SLOT), tl.load(piece + SLICE_P)
    g_at, y_at = walk.memory(plan, piece, GRADIENT, ON, False), walk.memory(plan, piece, WEIGHTS, ON, False)
    point_at = walk.memory(plan, piece, Z if ON.schedulefree else WEIGHTS, ON, False)
    packed = walk.samples(plan, piece, PACKED_Z, ON.weights_in_bf16)
    p0_at, s_at = walk.samples(plan, piece, P0, ON.samples_in_bf16), walk.samples(plan, piece, S, ON.samples_in_bf16)
    stale = _is_stale(plan, task, ON, AXES)
    sample = walk.of_task(plan, task, SAMPLE)
    dot, l1, square = tl.zeros([BS], tl.float64), tl.zeros([BS], tl.float64), tl.zeros([BS], tl.float64)
    for k in range(0, walk.stretches(plan, task, ON)):
        at, count = walk.stretch(plan, task, piece, k, ON, AXES)
        for start in range(0, count, BS):
            m = start + tl.arange(0, BS)
            mask, offset = m < count, at + m * slice_p
            g = gradient(plan, piece, g_at, y_at, offset, mask, slot, ROWS, ON)
            if ON.schedulefree:
                point = walk.read(packed, sample + m, walk.only_if(stale == 0, mask))
                if stale:
                    point = walk.read(point_at, offset, mask)
            else:
                point = walk.read(point_at, offset, mask)
            difference = walk.read(p0_at, sample + m, mask) - point
            if ON.weights_in_bf16 and ON.samples_in_bf16:
                difference = element.as_bf16(difference)
            dot += (g * difference).to(tl.float64)
            if ON.speed:
                l1 += tl.abs(difference).to(tl.float64)
                square += (difference * difference).to(tl.float64)
            else:
                s = formulas.gradient_sum(g, walk.read(s_at, sample + m, mask), plan, slot, ROWS, ON)
                l1 += tl.abs(s).to(tl.float64)
        sample += count
    keep(plan, task, DOT, tl.sum(dot))
    if ON.speed:
        keep(plan, task, DELTA_L1, tl.sum(l1))
        keep(plan, task, DELTA_SQUARE, tl.sum(square))
    else:
        keep(plan, task, S_L1, tl.sum(l1))


@triton.jit
def _is_stale(plan, task, ON: tl.constexpr, AXES: tl.constexpr):
    """Whether the packed samples, as far as the first of the task tell, are no longer those of z."""
    piece = walk.piece_of(plan, task)
    at, count = walk.stretch(plan, task, piece, walk.of_task(plan, task, BEGIN) * 0, ON, AXES)
    m = tl.arange(0, 8)
    mask = m < count
    stale = tl.zeros([8], tl.int32)
    if ON.schedulefree:
        z = walk.memory(plan, piece, Z, ON, False) + at + m * tl.load(piece + SLICE_P)
        packed = walk.samples(plan, piece, PACKED_Z, ON.weights_in_bf16) + walk.of_task(plan, task, SAMPLE) + m
        now = tl.load(z, mask=mask, other=0.0).to(tl.float32)
        then = tl.load(packed, mask=mask, other=0.0).to(tl.float32)
        stale = tl.where(element.bits_of(now) != element.bits_of(then), 1, 0)
    return tl.max(stale)


@triton.jit(do_not_specialize=["first"])
def pass_2(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """The size of the direction."""
    task = first + tl.program_id(0)
    if walk.is_wide(plan, task):
        _norms(plan, task, ON, ROWS, AXES, BM, BN, True)
    else:
        _norms(plan, task, ON, ROWS, AXES, BM, BN, False)


@triton.jit
def _norms(
    plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    piece = walk.piece_of(plan, task)
    slot, n = tl.load(piece + SLOT), walk.hinted(tl.load(piece + N), WIDE)
    lines, live = walk.lines_of(plan, task, BM)
    end = walk.hinted(walk.of_task(plan, task, END), WIDE)
    squares = tl.zeros([BM, BN], tl.float32)
    for start in range(walk.hinted(walk.of_task(plan, task, BEGIN), WIDE), end, BN):
        columns, inside, offset, mask = _tile(lines, live, start, end, n, BN, WIDE)
        u, _m, _v, _g = _direction(plan, piece, slot, lines, columns, live, inside, offset, mask, ON, ROWS, AXES, WIDE)
        squares += tl.where(mask, u * u, 0.0)
    keep(plan, task, UU, element.total(squares))


@triton.jit
def _direction(
    plan, piece, slot, lines, columns, live, inside, offset, mask, ON: tl.constexpr, ROWS: tl.constexpr,
    AXES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The direction of a tile, momentum and second moment after the step, and the gradient."""
    g_at, y_at = walk.memory(plan, piece, GRADIENT, ON, WIDE), walk.memory(plan, piece, WEIGHTS, ON, WIDE)
    g = gradient(plan, piece, g_at, y_at, offset, mask, slot, ROWS, ON)
    m, v, root = g, g, g
    if ON.momentum and not ON.schedulefree:
        m = walk.read(walk.memory(plan, piece, EXP_AVG, ON, WIDE), offset, mask)
    if ON.factored:
        root = walk.root_of(plan, piece, lines, columns, live, inside, ON, AXES)
    elif ON.second_moment:
        v = walk.read(walk.memory(plan, piece, EXP_AVG_SQ, ON, WIDE), offset, mask)
    u, m, v = formulas.direction(g, m, v, root, plan, slot, ROWS, ON)
    return u, m, v, g


@triton.jit(do_not_specialize=["first"])
def count_masks(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """Size of the mask of the Schedule-Free cautious update."""
    task = first + tl.program_id(0)
    if walk.is_wide(plan, task):
        _count(plan, task, ON, ROWS, AXES, BM, BN, True)
    else:
        _count(plan, task, ON, ROWS, AXES, BM, BN, False)


@triton.jit
def _count(
    plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    piece = walk.piece_of(plan, task)
    slot, n = tl.load(piece + SLOT), walk.hinted(tl.load(piece + N), WIDE)
    lines, live = walk.lines_of(plan, task, BM)
    end = walk.hinted(walk.of_task(plan, task, END), WIDE)
    agree = tl.zeros([BM, BN], tl.int32)
    for start in range(walk.hinted(walk.of_task(plan, task, BEGIN), WIDE), end, BN):
        columns, inside, offset, mask = _tile(lines, live, start, end, n, BN, WIDE)
        u, _m, _v, _g = _direction(plan, piece, slot, lines, columns, live, inside, offset, mask, ON, ROWS, AXES, WIDE)
        y = walk.read(walk.memory(plan, piece, WEIGHTS, ON, WIDE), offset, mask)
        z = walk.read(walk.memory(plan, piece, Z, ON, WIDE), offset, mask)
        u = formulas.finish(u, y, plan, slot, ROWS, ON)
        step = formulas.masked_step(u, y, z, plan, slot, ROWS)
        agree += tl.where(mask & (u * step > 0), 1, 0)
    keep(plan, task, LATE_MASK, element.total(agree))


@triton.jit(do_not_specialize=["first"])
def pass_3(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """y, z, the elementwise moments, s and the packed samples of z, once in a step."""
    task = first + tl.program_id(0)
    slot = tl.load(walk.piece_of(plan, task) + SLOT)
    if tl.load(plan.moments_gate + slot) != 0:
        if tl.load(plan.done + task) == 0:
            moves = tl.load(plan.weights_gate + slot) != 0
            if ON.statistics and not ON.speed:
                if moves:
                    # From the weights before they move.
                    _write_s(plan, task, ON, ROWS, AXES, BS)
                    tl.debug_barrier()
            if walk.is_wide(plan, task):
                _write(plan, task, ON, ROWS, AXES, BM, BN, True)
            else:
                _write(plan, task, ON, ROWS, AXES, BM, BN, False)
            # What other threads have written of z is read.
            tl.debug_barrier()
            if ON.statistics and ON.schedulefree:
                if moves:
                    _pack(plan, task, ON, AXES, BS)
                    tl.debug_barrier()
            tl.store(plan.done + task, 1)


@triton.jit
def _write(
    plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    piece = walk.piece_of(plan, task)
    slot, n = tl.load(piece + SLOT), walk.hinted(tl.load(piece + N), WIDE)
    lines, live = walk.lines_of(plan, task, BM)
    live = walk.only_if(tl.load(plan.weights_gate + slot) != 0, live)
    end = walk.hinted(walk.of_task(plan, task, END), WIDE)
    index = tl.load(piece + INDEX) + walk.along_axes(piece, lines, INDEX_STRIDE, AXES)
    y_at, z_at = walk.memory(plan, piece, WEIGHTS, ON, WIDE), walk.memory(plan, piece, Z, ON, WIDE)
    for start in range(walk.hinted(walk.of_task(plan, task, BEGIN), WIDE), end, BN):
        columns, inside, offset, mask = _tile(lines, live, start, end, n, BN, WIDE)
        u, m, v, g = _direction(plan, piece, slot, lines, columns, live, inside, offset, mask, ON, ROWS, AXES, WIDE)
        y, z = walk.read(y_at, offset, mask), g
        if ON.schedulefree:
            z = walk.read(z_at, offset, mask)
        y, z = formulas.move(u, y, z, plan, slot, ROWS, ON)
        if ON.second_moment and not ON.factored:
            element.put(walk.memory(plan, piece, EXP_AVG_SQ, ON, WIDE) + offset, v, mask, ON.weights_in_bf16)
        if ON.momentum and not ON.schedulefree:
            element.put(walk.memory(plan, piece, EXP_AVG, ON, WIDE) + offset, m, mask, ON.weights_in_bf16)
        if ON.stochastic and ON.weights_in_bf16:
            key = tl.load(plan.keys + slot).to(tl.uint32, bitcast=True)
            random = element.mix((index[:, None] + columns[None, :]).to(tl.uint32) ^ key)
            element.put_stochastic(y_at + offset, y, mask, random >> 16)
            if ON.schedulefree:
                element.put_stochastic(z_at + offset, z, mask, random & 0xFFFF)
        else:
            element.put(y_at + offset, y, mask, ON.weights_in_bf16)
            if ON.schedulefree:
                element.put(z_at + offset, z, mask, ON.weights_in_bf16)


@triton.jit
def _write_s(plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BS: tl.constexpr):
    piece = walk.piece_of(plan, task)
    slot, slice_p = tl.load(piece + SLOT), tl.load(piece + SLICE_P)
    g_at, y_at = walk.memory(plan, piece, GRADIENT, ON, False), walk.memory(plan, piece, WEIGHTS, ON, False)
    s_at = walk.samples(plan, piece, S, ON.samples_in_bf16)
    sample = walk.of_task(plan, task, SAMPLE)
    for k in range(0, walk.stretches(plan, task, ON)):
        at, count = walk.stretch(plan, task, piece, k, ON, AXES)
        for start in range(0, count, BS):
            m = start + tl.arange(0, BS)
            mask = m < count
            g = gradient(plan, piece, g_at, y_at, at + m * slice_p, mask, slot, ROWS, ON)
            s = formulas.gradient_sum(g, walk.read(s_at, sample + m, mask), plan, slot, ROWS, ON)
            element.put(s_at + sample + m, s, mask, ON.samples_in_bf16)
        sample += count


@triton.jit
def _pack(plan, task, ON: tl.constexpr, AXES: tl.constexpr, BS: tl.constexpr):
    piece = walk.piece_of(plan, task)
    slice_p, sample = tl.load(piece + SLICE_P), walk.of_task(plan, task, SAMPLE)
    z_at, packed = walk.memory(plan, piece, Z, ON, False), walk.samples(plan, piece, PACKED_Z, ON.weights_in_bf16)
    for k in range(0, walk.stretches(plan, task, ON)):
        at, count = walk.stretch(plan, task, piece, k, ON, AXES)
        for start in range(0, count, BS):
            m = start + tl.arange(0, BS)
            z = tl.load(z_at + at + m * slice_p, mask=m < count)
            tl.store(packed + sample + m, z, mask=m < count)
        sample += count


@triton.jit(do_not_specialize=["first"])
def pack(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """The samples of z, packed."""
    _pack(plan, first + tl.program_id(0), ON, AXES, BS)
