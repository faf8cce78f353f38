"""The numbers of groups of Prodigy (``ppsf_dist.methods.prodigy``): one d, which serves the step that finds it."""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton import walk
from ppsf_dist.kernels.triton.numbers import (
    begin_groups,
    count_step,
    is_written,
    larger,
    power,
    put,
    put_averaging,
    put_if,
    row,
    smaller,
)  # fmt: skip

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def gain_of(groups, count, i, here, d, AT: tl.constexpr):
    """What multiplies the direction where this d is that of the step."""
    return tl.where(row(groups.given, AT.given.beta1, count, i, here) > 0.0, 1.0, d)


@triton.jit(do_not_specialize=["count"])
def begin_prodigy(
    groups, count, ON: tl.constexpr, AT: tl.constexpr, ARGUMENTS: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a step knows of its groups from its beginning on, and their coefficients. One program."""
    given, was, known, to = groups.given, groups.was, groups.known, groups.coefficients
    rates, unknown = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        lr = tl.where(i < count, row(given, AT.given.lr, count, i, i < count), 0.0)
        there = lr == lr
        rates, unknown = larger(rates, tl.where(there, lr, 0.0)), unknown + tl.where(there, 0.0, lr)
    # As torch.amax: of a NaN and numbers it is NaN.
    lr_of_all = tl.max(rates) + tl.sum(unknown)
    # With the arguments of the first group.
    steps = tl.load(was + AT.was.k * count) + 1.0
    of_beta1 = power(tl.load(given + AT.given.beta1 * count), steps)
    correction = tl.sqrt(1.0 - power(tl.load(given + AT.given.beta2 * count), steps)) / (1.0 - of_beta1)
    unsound = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        d, k = row(was, AT.was.d, count, i, here), row(was, AT.was.k, count, i, here)
        lr, decay = row(given, AT.given.lr, count, i, here), row(given, AT.given.weight_decay, count, i, here)
        beta1, beta2 = row(given, AT.given.beta1, count, i, here), row(given, AT.given.beta2, count, i, here)
        corrects = row(given, AT.given.use_bias_correction, count, i, here) > 0.0
        delta = d * lr_of_all * tl.where(corrects, correction, 1.0)
        zero, pauses = k * 0.0, lr == 0.0
        sound = begin_groups(
            groups, count, i, here, k, delta, zero, zero + 1.0, k == k, k != k, pauses, AT, ARGUMENTS, ADAPTIVE
        )
        # Groups stand still or have the same lr.
        sound &= pauses | (lr == lr_of_all)
        unsound += tl.where(here, tl.where(sound, 0.0, 1.0), 0.0)
        put(known, AT.known.d, count, i, here, d)
        put(known, AT.known.d_max, count, i, here, row(was, AT.was.d_max, count, i, here))
        put(known, AT.known.d_hat, count, i, here, row(was, AT.was.d_hat, count, i, here))
        put(known, AT.known.d_numerator, count, i, here, row(was, AT.was.d_numerator, count, i, here))
        put(known, AT.known.d_denom, count, i, here, row(was, AT.was.d_denom, count, i, here))

        gain, keep = gain_of(groups, count, i, here, d, AT), 1.0 - decay * delta
        put_averaging(groups, count, i, here, delta, zero, zero + 1.0, beta1, decay, keep, gain, AT)
        put(to, AT.coefficients.d_eps, count, i, here, d * row(given, AT.given.eps, count, i, here))
        put(to, AT.coefficients.momentum_weight, count, i, here, (1.0 - beta1) * d)
        put(to, AT.coefficients.beta2, count, i, here, beta2)
        put(to, AT.coefficients.square_weight, count, i, here, (1.0 - beta2) * d * d)
        put(to, AT.coefficients.beta3, count, i, here, row(given, AT.given.beta3, count, i, here))
        warms = row(given, AT.given.safeguard_warmup, count, i, here) > 0.0
        weight = d / row(given, AT.given.d0, count, i, here) * tl.where(warms, d, delta)
        put(to, AT.coefficients.s_weight, count, i, here, weight)
    tl.store(known + AT.known.unsound * count, tl.sum(unsound))


@triton.jit(do_not_specialize=["count"])
def learn_prodigy(groups, totals, count, ON: tl.constexpr, AT: tl.constexpr, BLOCK: tl.constexpr):
    """d of this step (``adapted_for_all`` of ``ppsf_dist.algorithm.step_size``) from the totals. One program."""
    given, was, known, to = groups.given, groups.was, groups.known, groups.coefficients
    numerators, denominators = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        weight = row(was, AT.was.d, count, i, here) / row(given, AT.given.d0, count, i, here)
        weight *= row(known, AT.known.delta, count, i, here)
        numerators += tl.where(here, weight * row(totals, AT.total.numerator, count, i, here), 0.0)
        denominators += tl.where(here, row(totals, AT.total.denominator, count, i, here), 0.0)
    numerator, denominator = tl.sum(numerators), tl.sum(denominators)
    there, beta3 = denominator > 0.0, tl.load(given + AT.given.beta3 * count)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        old, d0 = row(was, AT.was.d, count, i, here), row(given, AT.given.d0, count, i, here)
        rate = row(given, AT.given.growth_rate, count, i, here)
        total = beta3 * row(was, AT.was.d_numerator, count, i, here) + numerator
        found = row(given, AT.given.d_coef, count, i, here) * total / tl.where(there, denominator, 1.0)
        most = larger(row(was, AT.was.d_max, count, i, here), found)
        limit = tl.where(rate > 0.0, tl.where(old == d0, larger(old, found), old) * rate, INFINITY)
        d = smaller(most, limit)
        put(known, AT.known.d, count, i, here, d)
        put(known, AT.known.d_max, count, i, here, most)
        put(known, AT.known.d_hat, count, i, here, found)
        put(known, AT.known.d_numerator, count, i, here, total)
        put(known, AT.known.d_denom, count, i, here, tl.where(here, denominator, 0.0))
        # Where no gradient has been seen yet there is no estimate, and no step.
        put(known, AT.known.moves, count, i, here, tl.where(walk.only_if(there, here), 1.0, 0.0))
        put(to, AT.coefficients.gain, count, i, here, gain_of(groups, count, i, here, d, AT))
        put(to, AT.coefficients.d_eps, count, i, here, d * row(given, AT.given.eps, count, i, here))


@triton.jit(do_not_specialize=["count"])
def end_prodigy(groups, totals, after, count, ON: tl.constexpr, AT: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers after a step from the totals of its parts. Of a void one what is counted. One program."""
    known, ok = groups.known, is_written(groups, totals, count, AT, BLOCK)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        count_step(groups, totals, after, count, i, here, ok, AT)
        put_if(groups, after, AT.was.d, count, i, here, ok, row(known, AT.known.d, count, i, here))
        put_if(groups, after, AT.was.d_max, count, i, here, ok, row(known, AT.known.d_max, count, i, here))
        put_if(groups, after, AT.was.d_hat, count, i, here, ok, row(known, AT.known.d_hat, count, i, here))
        put_if(groups, after, AT.was.d_numerator, count, i, here, ok, row(known, AT.known.d_numerator, count, i, here))
        put_if(groups, after, AT.was.d_denom, count, i, here, ok, row(known, AT.known.d_denom, count, i, here))
