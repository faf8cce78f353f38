"""What the numbers of groups have in common whatever the method, in fp64: for torch a hundred short operators.

The formulas are those of ``cpu/numbers.h``, in the order of its operations; what each method does of its own is in
``numbers_of_*.py``. Tables are rows by groups; AT says which row is which, ON what there is to do
(``ppsf_dist.kernels.triton.step_numbers``).
"""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.2250738585072014e-308)
INFINITY = tl.constexpr(float("inf"))
BITS_OF_A_COUNT = tl.constexpr(40)


@triton.jit
def row(table, number, count, i, here):
    """Some columns of a row of a table of ``count`` columns; 1 where they are not there."""
    return tl.load(table + number * count + i, mask=here, other=1.0)


@triton.jit
def put(table, number, count, i, here, x):
    tl.store(table + number * count + i, x, mask=here)


@triton.jit
def put_if(groups, after, number, count, i, here, condition, x):
    """A number after the step: this one on a condition, else that before it."""
    put(after, number, count, i, here, tl.where(condition, x, row(groups.was, number, count, i, here)))


@triton.jit
def larger(a, b):
    """As torch.maximum: of a NaN and a number it is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def is_finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def fourth_root(x):
    return tl.sqrt(tl.sqrt(x))


@triton.jit
def power(base, count):
    """``base^count`` by squaring."""
    n, result = count.to(tl.int64), count * 0.0 + 1.0
    for _ in tl.static_range(BITS_OF_A_COUNT):
        result = tl.where((n & 1) != 0, result * base, result)
        base, n = base * base, n >> 1
    return result


@triton.jit
def radam(k, beta2):
    """RAdam's beta2 and rectification (``ppsf_dist.algorithm.second_moment``)."""
    grown, longest = power(beta2, k), 2.0 / (1.0 - beta2) - 1.0
    rho = longest - 2.0 * k * grown / (1.0 - grown)
    variance = (rho - 4.0) * (rho - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * rho)
    rectification = tl.sqrt(larger(tl.where(rho > 4.0, variance, 0.0), 0.0))
    return 1.0 - (1.0 - beta2) / (1.0 - grown), rectification


@triton.jit
def put_averaging(groups, count, i, here, delta, c, q, beta1, decay, keep, gain, AT: tl.constexpr):
    """The coefficients of every method."""
    to = groups.coefficients
    put(to, AT.coefficients.delta, count, i, here, delta)
    put(to, AT.coefficients.c, count, i, here, c)
    put(to, AT.coefficients.q, count, i, here, q)
    put(to, AT.coefficients.beta1, count, i, here, beta1)
    put(to, AT.coefficients.weight_decay, count, i, here, decay)
    put(to, AT.coefficients.keep, count, i, here, keep)
    put(to, AT.coefficients.gain, count, i, here, gain)


@triton.jit
def averaged(weight, weight_sum):
    """The share of a step of some weight in the average (``ppsf_dist.algorithm.averaging``), and the new sum."""
    total = weight_sum + weight
    return tl.where(total > 0.0, weight / larger(total, SMALLEST), 0.0), total


@triton.jit
def begin_groups(
    groups, count, i, here, k, delta, c, q, adapts, speeds, pauses, AT: tl.constexpr, ARGUMENTS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """What a step of every method knows of groups, which move as far as it knows now.

    Returns:
        Whether their arguments, and the first so many adaptive numbers, are finite.
    """
    known, sound = groups.known, is_finite(k)
    for argument in tl.static_range(ARGUMENTS):
        sound &= is_finite(row(groups.given, argument, count, i, here))
    for number in tl.static_range(ADAPTIVE):
        sound &= is_finite(row(groups.was, number, count, i, here))
    put(known, AT.known.k, count, i, here, k)
    put(known, AT.known.delta, count, i, here, delta)
    put(known, AT.known.c, count, i, here, c)
    put(known, AT.known.q, count, i, here, q)
    put(known, AT.known.adapts, count, i, here, tl.where(adapts, 1.0, 0.0))
    put(known, AT.known.speeds, count, i, here, tl.where(speeds, 1.0, 0.0))
    put(known, AT.known.pauses, count, i, here, tl.where(pauses, 1.0, 0.0))
    put(known, AT.known.moves, count, i, here, k * 0.0 + 1.0)
    return sound


@triton.jit
def is_written(groups, totals, count, AT: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a step is not void: no part has a cause not to write, and some group moves."""
    voids, moves = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        voids += tl.where(here & (row(totals, AT.total.cause, count, i, here) != AT.cause.nothing), 1.0, 0.0)
        moves += tl.where(here, row(groups.known, AT.known.moves, count, i, here), 0.0)
    return (tl.sum(voids) == 0.0) & (tl.sum(moves) > 0.0)


@triton.jit
def count_step(groups, totals, after, count, i, here, ok, AT: tl.constexpr):
    """What is counted of every step, void or not."""
    was = groups.was
    put_if(groups, after, AT.was.k, count, i, here, ok, row(was, AT.was.k, count, i, here) + 1.0)
    cause = row(totals, AT.total.cause, count, i, here)
    put(after, AT.was.cause, count, i, here, tl.where(ok, row(was, AT.was.cause, count, i, here), cause))
    skips = (cause == AT.cause.gradient) | (cause == AT.cause.number)
    skipped = row(was, AT.was.skipped_steps, count, i, here)
    put_if(groups, after, AT.was.skipped_steps, count, i, here, skips, skipped + 1.0)
    failures = row(was, AT.was.failures, count, i, here)
    put_if(groups, after, AT.was.failures, count, i, here, cause == AT.cause.failure, failures + 1.0)
    square = row(totals, AT.total.gradient_square, count, i, here)
    put(after, AT.was.gradient_norm, count, i, here, tl.sqrt(square))
    square = row(totals, AT.total.update_square, count, i, here)
    put(after, AT.was.update_norm, count, i, here, tl.sqrt(square))
