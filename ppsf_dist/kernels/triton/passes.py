"""The passes of ``ppsf_dist.kernels.interface`` over the tasks of a launch, which share everything in capitals.

ON: the formulas. ROWS: where each coefficient stands. AXES: of the lines of a piece. BM, BN: the tile. BS: at most so
many samples has a line of it. SHORT: of ``walk.samples``. Each tile is read while the one before it is computed.
Programs share no place that they write to, so that sums come in one order and every run has the same d.
"""

import triton
import triton.language as tl

from ppsf_dist.kernels.codes import Sum
from ppsf_dist.kernels.triton import element, formulas, walk
from ppsf_dist.kernels.triton.tables import Fetched, SampleSums
from ppsf_dist.kernels.triton.walk import (
    BEGIN,
    COL,
    COL_STRIDE,
    INDEX,
    INDEX_STRIDE,
    PARTIAL,
    ROW,
    ROW_STEP,
    ROW_STRIDE,
    SLOT,
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
def fetch(at, live, row, start, n, length, BM: tl.constexpr, BN: tl.constexpr, ON: tl.constexpr, PASS: tl.constexpr):
    """Read what a pass needs of a tile, as it is stored."""
    _columns, _inside, offset, mask = walk.tile(live, row, start, n, length, BM, BN)
    g = tl.load(at.gradient + offset, mask=walk.only_if(at.has_gradient, mask), other=0.0)
    y, z, m, v = g, g, g, g
    if ON.coupled_decay or PASS > 2:
        y = tl.load(at.weights + offset, mask=mask, other=0.0)
    if ON.schedulefree and PASS > 2:
        z = tl.load(at.z + offset, mask=mask, other=0.0)
    if ON.momentum and not ON.schedulefree and (PASS > 1 or ON.cautious):
        m = tl.load(at.exp_avg + offset, mask=mask, other=0.0)
    if ON.second_moment and not ON.factored and PASS > 1:
        v = tl.load(at.exp_avg_sq + offset, mask=mask, other=0.0)
    return Fetched(g=g, y=y, z=z, m=m, v=v)


@triton.jit
def in_fp32(tile, of, ON: tl.constexpr):
    """What was fetched, as fp32; with the weights in the gradient, where they decay so."""
    g, y = tile.g.to(tl.float32), tile.y.to(tl.float32)
    if ON.coupled_decay:
        g = y * of.weight_decay + g
    return Fetched(g=g, y=y, z=tile.z.to(tl.float32), m=tile.m.to(tl.float32), v=tile.v.to(tl.float32))


@triton.jit
def gradient_of(at, place, mask, of, ON: tl.constexpr):
    """The gradient at some places: zeros where there is none."""
    g = walk.read(at.gradient, place, walk.only_if(at.has_gradient, mask))
    if ON.coupled_decay:
        g = walk.read(at.weights, place, mask) * of.weight_decay + g
    return g


@triton.jit(do_not_specialize=["first"])
def pass_1(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a task, by row and column of a matrix, and all sums that need nothing of this step."""
    task = first + tl.program_id(0)
    if walk.is_wide(plan, task):
        _sum(plan, task, ON, ROWS, AXES, BM, BN, BS, SHORT, True)
    else:
        _sum(plan, task, ON, ROWS, AXES, BM, BN, BS, SHORT, False)


@triton.jit
def _sum(
    plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    piece = walk.piece_of(plan, task)
    of, at = formulas.numbers_of(plan, tl.load(piece + SLOT), ROWS), walk.places(plan, task, ON, WIDE)
    n, length = walk.steps_of(plan, task, WIDE)
    partial = plan.partial + walk.of_task(plan, task, PARTIAL)
    if ON.matrix and ON.owned:
        most, total = tl.zeros([BM], tl.int32), tl.zeros([BM], tl.float64)
    else:
        most, total = tl.zeros([BM, BN], tl.int32), tl.zeros([BM, BN], tl.float32)
    agree, sums = tl.zeros([BM, BN], tl.int32), _no_sums(BM, BS)
    kept, stale, before = walk.kept_samples(plan, task, ON), _is_stale(plan, task, ON, AXES), 0
    for row in range(0, walk.line_count(plan, task), BM):
        lines, live = walk.lines_of(plan, task, row, BM)
        squares, passed = tl.zeros([BM, BN], tl.float32), tl.zeros([BM * BS], tl.int32)
        samples, before = walk.samples(plan, task, lines, live, row, n, length, before, AXES, BM, BN, BS, SHORT)
        ahead = fetch(at, live, row, 0, n, length, BM, BN, ON, 1)
        for start in range(0, length, BN):
            columns, inside, offset, mask = walk.tile(live, row, start, n, length, BM, BN)
            now = in_fp32(ahead, of, ON)
            ahead = fetch(at, live, row, start + BN, n, length, BM, BN, ON, 1)
            if ON.statistics and ON.owned:
                # Here, so that all reads of a tile are waited for together.
                place, sample, there = walk.samples_of_tile(samples, passed, start + BN, SHORT)
                sums = _sum_samples(sums, at, kept, place, sample, there, stale, of, ON)
                passed = walk.pass_tile(samples, passed, start + BN)
            square = now.g * now.g
            squares += square
            if ON.matrix and ON.owned:
                tl.store(partial + columns, tl.sum(square, 0), mask=inside)
            else:
                most = tl.maximum(most, (element.bits_of(square) & 0x7FFFFFFF).to(tl.int32))
            if ON.cautious and not ON.schedulefree and ON.owned:
                agree += tl.where(mask & (now.g * formulas.momentum(now.g, now.m, of, ON) > 0), 1, 0)
        if ON.matrix and ON.owned:
            of_line = tl.sum(squares, 1)
            of_lines = plan.sums + _lines_at(piece, lines, AXES)
            tl.store(of_lines, tl.load(of_lines, mask=live, other=0.0) + of_line, mask=live)
            most = tl.maximum(most, (element.bits_of(of_line) & 0x7FFFFFFF).to(tl.int32))
            total += of_line.to(tl.float64)
            partial += n
        else:
            total += squares
    largest = element.largest_of(most)
    if ON.owned:
        keep(plan, task, LARGEST_SQUARE, largest)
        keep(plan, task, GG, element.total(total))
    else:
        # A replica adds nothing, unless its gradient is not finite.
        keep(plan, task, LARGEST_SQUARE, tl.where(largest - largest == 0, 0.0, largest))
        keep(plan, task, GG, 0.0)
    if ON.cautious and not ON.schedulefree and ON.owned:
        keep(plan, task, EARLY_MASK, element.total(agree))
    if ON.statistics and ON.owned:
        keep(plan, task, DOT, tl.sum(sums.dot))
        keep(plan, task, DELTA_L1 if ON.speed else S_L1, tl.sum(sums.l1))
        if ON.speed:
            keep(plan, task, DELTA_SQUARE, tl.sum(sums.square))


@triton.jit
def _lines_at(piece, lines, AXES: tl.constexpr):
    """Where the sums of squares of the lines of a matrix go, each of which is a row or a column."""
    row = tl.load(piece + ROW) + walk.along_axes(piece, lines, ROW_STRIDE, AXES)
    col = tl.load(piece + COL) + walk.along_axes(piece, lines, COL_STRIDE, AXES)
    return tl.where(tl.load(piece + ROW_STEP) == 0, row, col)


@triton.jit
def _no_sums(BM: tl.constexpr, BS: tl.constexpr):
    return SampleSums(
        dot=tl.zeros([BM * BS], tl.float64), l1=tl.zeros([BM * BS], tl.float64), square=tl.zeros([BM * BS], tl.float64)
    )


@triton.jit
def _sum_samples(sums, at, kept, place, sample, mask, stale, of, ON: tl.constexpr):
    """Prodigy's sums with some samples more: where these are in the task, and which they are."""
    g = gradient_of(at, place, mask, of, ON)
    if ON.schedulefree:
        fresh = walk.read(kept.packed, sample, walk.only_if(stale == 0, mask))
        point = tl.where(stale == 0, fresh, walk.read(at.z, place, walk.only_if(stale != 0, mask)))
    else:
        point = walk.read(at.weights, place, mask)
    difference = walk.read(kept.p0, sample, mask) - point
    if ON.weights_in_bf16 and ON.samples_in_bf16:
        difference = element.as_bf16(difference)
    if ON.speed:
        l1, square = tl.abs(difference), difference * difference
    else:
        l1, square = tl.abs(formulas.gradient_sum(g, walk.read(kept.s, sample, mask), of, ON)), difference
    return SampleSums(
        dot=sums.dot + (g * difference).to(tl.float64),
        l1=sums.l1 + l1.to(tl.float64),
        square=sums.square + square.to(tl.float64),
    )


@triton.jit
def _is_stale(plan, task, ON: tl.constexpr, AXES: tl.constexpr):
    """Whether the packed samples, as far as the first of the task tell, are no longer those of z."""
    stale = 0
    if ON.schedulefree and ON.statistics and ON.owned:
        n, length = walk.steps_of(plan, task, False)
        lines, live = walk.lines_of(plan, task, 0, 1)
        samples, _before = walk.samples(plan, task, lines, live, 0, n, length, 0, AXES, 1, 8, 8, False)
        place, sample, there = walk.samples_of_tile(samples, 0, length, False)
        now = walk.read(walk.places(plan, task, ON, False).z, place, there)
        then = walk.read(walk.kept_samples(plan, task, ON).packed, sample, there)
        stale = tl.max(tl.where(element.bits_of(now) != element.bits_of(then), 1, 0))
    return stale


@triton.jit(do_not_specialize=["first"])
def pass_2(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr,
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
    slot = tl.load(walk.piece_of(plan, task) + SLOT)
    of, at = formulas.numbers_of(plan, slot, ROWS), walk.places(plan, task, ON, WIDE)
    n, length = walk.steps_of(plan, task, WIDE)
    squares = tl.zeros([BM, BN], tl.float32)
    for row in range(0, walk.line_count(plan, task), BM):
        lines, live = walk.lines_of(plan, task, row, BM)
        factors = walk.factors(plan, task, lines, live, ON, AXES)
        ahead = fetch(at, live, row, 0, n, length, BM, BN, ON, 2)
        for start in range(0, length, BN):
            columns, inside, offset, mask = walk.tile(live, row, start, n, length, BM, BN)
            now = in_fp32(ahead, of, ON)
            ahead = fetch(at, live, row, start + BN, n, length, BM, BN, ON, 2)
            root = walk.root_of(factors, columns, inside, mask, ON)
            u, _m, _v = formulas.direction(now.g, now.m, now.v, root, of, ON, False)
            squares += tl.where(mask, u * u, 0.0)
    keep(plan, task, UU, element.total(squares))


@triton.jit(do_not_specialize=["first"])
def count_masks(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr,
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
    slot = tl.load(walk.piece_of(plan, task) + SLOT)
    of, at = formulas.numbers_of(plan, slot, ROWS), walk.places(plan, task, ON, WIDE)
    n, length = walk.steps_of(plan, task, WIDE)
    agree = tl.zeros([BM, BN], tl.int32)
    for row in range(0, walk.line_count(plan, task), BM):
        lines, live = walk.lines_of(plan, task, row, BM)
        factors = walk.factors(plan, task, lines, live, ON, AXES)
        ahead = fetch(at, live, row, 0, n, length, BM, BN, ON, 3)
        for start in range(0, length, BN):
            columns, inside, offset, mask = walk.tile(live, row, start, n, length, BM, BN)
            now = in_fp32(ahead, of, ON)
            ahead = fetch(at, live, row, start + BN, n, length, BM, BN, ON, 3)
            root = walk.root_of(factors, columns, inside, mask, ON)
            u, _m, _v = formulas.direction(now.g, now.m, now.v, root, of, ON, True)
            u = formulas.finish(u, now.y, of, ON)
            step = formulas.masked_step(u, now.y, now.z, of)
            agree += tl.where(mask & (u * step > 0), 1, 0)
    keep(plan, task, LATE_MASK, element.total(agree))


@triton.jit(do_not_specialize=["first"])
def pass_3(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """y, z, the elementwise moments, s and the packed samples of z, once in a step."""
    task = first + tl.program_id(0)
    slot = tl.load(walk.piece_of(plan, task) + SLOT)
    if tl.load(plan.moments_gate + slot) != 0:
        if tl.load(plan.done + task) == 0:
            if walk.is_wide(plan, task):
                _write(plan, task, ON, ROWS, AXES, BM, BN, BS, SHORT, True)
            else:
                _write(plan, task, ON, ROWS, AXES, BM, BN, BS, SHORT, False)
            tl.debug_barrier()
            tl.store(plan.done + task, 1)


@triton.jit
def _write(
    plan, task, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    piece = walk.piece_of(plan, task)
    slot = tl.load(piece + SLOT)
    of, at = formulas.numbers_of(plan, slot, ROWS), walk.places(plan, task, ON, WIDE)
    n, length = walk.steps_of(plan, task, WIDE)
    key = tl.load(plan.keys + slot).to(tl.uint32, bitcast=True)
    begin = tl.load(piece + INDEX) + walk.of_task(plan, task, BEGIN)
    kept, before = walk.kept_samples(plan, task, ON), 0
    for row in range(0, walk.line_count(plan, task), BM):
        lines, live = walk.lines_of(plan, task, row, BM)
        live = walk.only_if(tl.load(plan.weights_gate + slot) != 0, live)
        factors = walk.factors(plan, task, lines, live, ON, AXES)
        index = (begin + walk.along_axes(piece, lines, INDEX_STRIDE, AXES)).to(tl.uint32)
        samples, before = walk.samples(plan, task, lines, live, row, n, length, before, AXES, BM, BN, BS, SHORT)
        packed, passed = tl.zeros([BM * BS], tl.int32), tl.zeros([BM * BS], tl.int32)
        ahead = fetch(at, live, row, 0, n, length, BM, BN, ON, 3)
        for start in range(0, length, BN):
            columns, inside, offset, mask = walk.tile(live, row, start, n, length, BM, BN)
            now = in_fp32(ahead, of, ON)
            ahead = fetch(at, live, row, start + BN, n, length, BM, BN, ON, 3)
            # What is read here is used at the end, when it has arrived.
            if ON.statistics and ON.schedulefree and not SHORT:
                # Of the tile before this one: by now it is written.
                old_place, old_sample, were_there = walk.samples_of_tile(samples, packed, start, False)
                of_z = tl.load(at.z + old_place, mask=were_there)
            if ON.statistics and not ON.speed:
                place, sample, there = walk.samples_of_tile(samples, passed, start + BN, SHORT)
                of_g, s = gradient_of(at, place, there, of, ON), walk.read(kept.s, sample, there)
                if ON.coupled_decay:
                    # From the weights before they move.
                    tl.debug_barrier()
            root = walk.root_of(factors, columns, inside, mask, ON)
            u, m, v = formulas.direction(now.g, now.m, now.v, root, of, ON, True)
            y, z = formulas.move(u, now.y, now.z, of, ON)
            if ON.second_moment and not ON.factored:
                element.put(at.exp_avg_sq + offset, v, mask, ON.weights_in_bf16)
            if ON.momentum and not ON.schedulefree:
                element.put(at.exp_avg + offset, m, mask, ON.weights_in_bf16)
            if ON.stochastic and ON.weights_in_bf16:
                random = element.mix((index[:, None] + columns[None, :].to(tl.uint32)) ^ key)
                element.put_stochastic(at.weights + offset, y, mask, random >> 16)
                if ON.schedulefree:
                    element.put_stochastic(at.z + offset, z, mask, random & 0xFFFF)
            else:
                element.put(at.weights + offset, y, mask, ON.weights_in_bf16)
                if ON.schedulefree:
                    element.put(at.z + offset, z, mask, ON.weights_in_bf16)
            if ON.statistics and not ON.speed:
                s = formulas.gradient_sum(of_g, s, of, ON)
                element.put(kept.s + sample, s, there, ON.samples_in_bf16)
            if ON.statistics and ON.schedulefree:
                if not SHORT:
                    tl.store(kept.packed + old_sample, of_z, mask=were_there)
                # What other threads write of z is read.
                tl.debug_barrier()
            packed, passed = passed, walk.pass_tile(samples, passed, start + BN)
        if ON.statistics and ON.schedulefree:
            place, sample, there = walk.samples_of_tile(samples, packed, length, SHORT)
            _pack(at, kept, place, sample, there)


@triton.jit
def _pack(at, kept, place, sample, mask):
    tl.store(kept.packed + sample, tl.load(at.z + place, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["first"])
def pack(
    plan, first, ON: tl.constexpr, ROWS: tl.constexpr, AXES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """The samples of z, packed."""
    task, before = first + tl.program_id(0), 0
    at, kept = walk.places(plan, task, ON, False), walk.kept_samples(plan, task, ON)
    n, length = walk.steps_of(plan, task, False)
    for row in range(0, walk.line_count(plan, task), BM):
        lines, live = walk.lines_of(plan, task, row, BM)
        samples, before = walk.samples(plan, task, lines, live, row, n, length, before, AXES, BM, BN, BS, SHORT)
        passed = tl.zeros([BM * BS], tl.int32)
        for start in range(0, length, BN):
            place, sample, there = walk.samples_of_tile(samples, passed, start + BN, SHORT)
            _pack(at, kept, place, sample, there)
            passed = walk.pass_tile(samples, passed, start + BN)
