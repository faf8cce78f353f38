"""The numbers of parameters between the passes, in fp64, as ``ppsf_dist.kernels.triton.numbers`` of groups."""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton import element, numbers, walk

# Its bits: a global that differs from itself has changed, Triton says, and refuses to launch again.
NAN = tl.constexpr(0x7FF8000000000000)
OF_PARAMETER = tl.constexpr(0x632BE5AB)
SMALLEST_MASK = tl.constexpr(1e-3)
SMALLEST_LENGTH = tl.constexpr(1e-8)


@triton.jit(do_not_specialize=["groups_count", "count"])
def fill_coefficients(groups, of, groups_count, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Those of its group for each parameter."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    group = tl.load(of.group_of + i, mask=here, other=0)
    for number in tl.static_range(ROWS):
        numbers.put(
            of.coefficients, number, count, i, here, numbers.row(groups.coefficients, number, groups_count, group, here)
        )


@triton.jit(do_not_specialize=["seed", "count"])
def fill_keys(of, seed, count, AT: tl.constexpr, BLOCK: tl.constexpr):
    """Those of stochastic rounding (``ppsf_dist.algorithm.rounding``)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    steps = numbers.row(of.numbers, AT.memory.step, count, i, here).to(tl.int64)
    key = element.mix((steps + seed).to(tl.uint32))
    of_parameter = tl.load(of.param_id + i, mask=here, other=0) * OF_PARAMETER
    key = element.mix(key ^ of_parameter.to(tl.uint32))
    tl.store(of.keys + i, key.to(tl.int32, bitcast=True), mask=here)


@triton.jit
def sum_of(of, i, here, number, COLUMNS: tl.constexpr):
    """One of the sums of some parameters, which are a table of parameters by sums."""
    return tl.load(of.stats + i * COLUMNS + number, mask=here, other=0.0)


@triton.jit
def has(traits, bit):
    return (traits & bit) != 0


@triton.jit
def of_mask(count, numel):
    return 1.0 / numbers.larger(count / numel, SMALLEST_MASK)


@triton.jit
def amount(of, count, i, here, traits, numel, AT: tl.constexpr, COLUMNS: tl.constexpr):
    """What multiplies the direction of a parameter: the gain with an early mask, and StableAdamW's factor."""
    gain = numbers.row(of.coefficients, AT.coefficients.gain, count, i, here).to(tl.float64)
    mask = of_mask(sum_of(of, i, here, AT.stat.early_mask, COLUMNS), numel)
    gain = tl.where(has(traits, AT.trait.early_mask), gain * mask, gain)
    rms = tl.sqrt(sum_of(of, i, here, AT.stat.uu, COLUMNS) * gain * gain / numel)
    return tl.where(has(traits, AT.trait.stableadamw), 1.0 / tl.sqrt(numbers.larger(rms, 1.0)), 1.0) * gain


@triton.jit(do_not_specialize=["groups_count", "count"])
def fill_scales(
    groups, of, groups_count, count, AT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``ppsf_dist.kernels.interface.Scales`` from the sums of all ranks."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    traits, numel = tl.load(of.traits + i, mask=here, other=0), numbers.row(of.numel, 0, count, i, here)
    factor = amount(of, count, i, here, traits, numel, AT, COLUMNS)
    mask = of_mask(sum_of(of, i, here, AT.stat.late_mask, COLUMNS), numel)
    delta = numbers.row(groups.known, AT.known.delta, groups_count, tl.load(of.group_of + i, mask=here, other=0), here)
    numbers.put(of.scales, AT.scale.amount, count, i, here, factor)
    numbers.put(of.scales, AT.scale.pull, count, i, here, tl.zeros([BLOCK], tl.float32))
    numbers.put(of.scales, AT.scale.mask, count, i, here, tl.where(has(traits, AT.trait.late_mask), mask, 1.0))
    numbers.put(of.scales, AT.scale.advance, count, i, here, factor * delta)


@triton.jit(do_not_specialize=["groups_count", "count"])
def find_cause(
    groups, of, squares, active, cause, groups_count, count, AT: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Which parameters have a gradient on some rank, and a group that does not pause, and why nothing may be written,
    if so. One program.

    In fp64 the sums of finite numbers are finite, and sums of others are not: ``squares`` is that of g^2.
    """
    weights, gradients = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        group = tl.load(of.group_of + i, mask=here, other=0)
        pauses = numbers.row(groups.known, AT.known.pauses, groups_count, group, here) != 0.0
        moves = (sum_of(of, i, here, AT.stat.present, COLUMNS) > 0.0) & (pauses == 0)
        tl.store(active + i, moves.to(tl.uint8), mask=here)
        for number in tl.static_range(COLUMNS):
            if number >= AT.stat.dot and number < AT.stat.late_mask:
                weights += tl.where(numbers.is_finite(sum_of(of, i, here, number, COLUMNS)), 0.0, 1.0)
        gradients += tl.where(numbers.is_finite(sum_of(of, i, here, AT.stat.largest_square, COLUMNS)), 0.0, 1.0)
    found = tl.where(tl.sum(weights) > 0.0, AT.cause.weights, AT.cause.nothing)
    sound = (tl.sum(gradients) == 0.0) & numbers.is_finite(tl.load(squares))
    found = tl.where(sound, found, AT.cause.gradient)
    found = tl.where(tl.load(of.outcome + AT.outcome.unsound) > 0.0, AT.cause.number, found)
    fails = (tl.load(of.outcome + AT.outcome.failed) > 0.0) | (tl.load(of.outcome + AT.outcome.replans) > 0.0)
    tl.store(cause, tl.where(fails, AT.cause.failure, found).to(tl.float64))


@triton.jit
def as_stored(x, rounds):
    return tl.where(rounds, element.as_bf16(x.to(tl.float32)).to(tl.float64), x)


@triton.jit(do_not_specialize=["groups_count", "count"])
def contribute(
    groups, of, active, cause, totals, after, groups_count, count, ON: tl.constexpr, AT: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the parameters of a group add to it, and their own numbers after the step. A program for each group.

    Of a part that is not written only the cause and the gradient's norm count.
    """
    g = tl.program_id(0)
    at = groups.known + g
    k, delta = tl.load(at + AT.known.k * groups_count), tl.load(at + AT.known.delta * groups_count)
    adapts = tl.load(at + AT.known.adapts * groups_count) != 0.0
    numerators, denominators = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    moved, gradient_squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    update_squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        here &= tl.load(of.group_of + i, mask=here, other=-1) == g
        moves = here & (tl.load(active + i, mask=here, other=0) != 0)
        counts = walk.only_if(adapts, moves)
        traits, numel = tl.load(of.traits + i, mask=here, other=0), numbers.row(of.numel, 0, count, i, here)
        rounds = has(traits, AT.trait.rounds_samples)
        dot = as_stored(sum_of(of, i, here, AT.stat.dot, COLUMNS), rounds)
        s_l1 = as_stored(sum_of(of, i, here, AT.stat.s_l1, COLUMNS), has(traits, AT.trait.rounds_s))
        numerator, denominator = dot, s_l1
        numbers.put(
            after, AT.memory.step, count, i, here, numbers.row(of.numbers, AT.memory.step, count, i, here) + 1.0
        )
        average = numbers.row(of.numbers, AT.memory.exp_avg_x0_dot, count, i, here)
        l1 = numbers.row(of.numbers, AT.memory.max_x0_minus_l1_norm, count, i, here)
        l2 = numbers.row(of.numbers, AT.memory.max_x0_minus_l2_norm, count, i, here)
        if ON.speed:
            speeds = tl.load(at + AT.known.speeds * groups_count) != 0.0
            now_l1 = as_stored(sum_of(of, i, here, AT.stat.delta_l1, COLUMNS), rounds)
            now_l2 = as_stored(tl.sqrt(sum_of(of, i, here, AT.stat.delta_square, COLUMNS)), rounds)
            decay = 1.0 - 1.0 / (tl.sqrt(k) * numbers.fourth_root(k))
            new_average = tl.where(l1 == 0.0, dot, decay * average + (1.0 - decay) * dot)
            new_average = new_average.to(tl.float32).to(tl.float64)
            new_l1 = numbers.larger(now_l1, numbers.larger(l1, SMALLEST_LENGTH))
            new_l2 = numbers.larger(now_l2, numbers.larger(l2, SMALLEST_LENGTH))
            share = 1.0 / ((1.0 + new_l2) * (1.0 + new_l2)) * new_average / new_l1
            numerator, denominator = tl.where(speeds, share, dot), tl.where(speeds, new_l2, s_l1)
            learns = walk.only_if(speeds, counts)
            average = tl.where(learns, new_average, average)
            l1, l2 = tl.where(learns, new_l1, l1), tl.where(learns, new_l2, l2)
        numbers.put(after, AT.memory.exp_avg_x0_dot, count, i, here, average)
        numbers.put(after, AT.memory.max_x0_minus_l1_norm, count, i, here, l1)
        numbers.put(after, AT.memory.max_x0_minus_l2_norm, count, i, here, l2)
        advance = amount(of, count, i, here, traits, numel, AT, COLUMNS) * delta
        update = sum_of(of, i, here, AT.stat.uu, COLUMNS) * (advance * advance)
        numerators += tl.where(counts, numerator, 0.0)
        denominators += tl.where(counts, denominator, 0.0)
        moved += tl.where(moves, 1.0, 0.0)
        # Of one that stands still, too.
        gradient_squares += tl.where(here, sum_of(of, i, here, AT.stat.gg, COLUMNS), 0.0)
        unknown = tl.full([BLOCK], NAN, tl.int64).to(tl.float64, bitcast=True)
        update_squares += tl.where(moves, tl.where(has(traits, AT.trait.measured), update, unknown), 0.0)
    to = totals + g
    tl.store(to + AT.total.numerator * groups_count, tl.sum(numerators))
    tl.store(to + AT.total.denominator * groups_count, tl.sum(denominators))
    tl.store(to + AT.total.moved * groups_count, tl.sum(moved))
    tl.store(to + AT.total.gradient_square * groups_count, tl.sum(gradient_squares))
    tl.store(to + AT.total.update_square * groups_count, tl.sum(update_squares))
    tl.store(to + AT.total.cause * groups_count, tl.load(cause))


@triton.jit(do_not_specialize=["groups_count", "count"])
def fill_gates(groups, of, active, cause, groups_count, count, AT: tl.constexpr, BLOCK: tl.constexpr):
    """What pass 3 may write, once the step has been decided."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < count
    group = tl.load(of.group_of + i, mask=here, other=0)
    moves = numbers.row(groups.known, AT.known.moves, groups_count, group, here) != 0.0
    moves &= tl.load(active + i, mask=here, other=0) != 0
    writes = walk.only_if(tl.load(cause) == AT.cause.nothing, moves)
    tl.store(of.moments_gate + i, writes.to(tl.uint8), mask=here)
    tl.store(of.weights_gate + i, writes.to(tl.uint8), mask=here)
