"""The numbers of groups of ProdigyPlusScheduleFree (``ppsf_dist.methods.prodigy_plus``)."""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton import walk
from ppsf_dist.kernels.triton.numbers import (
    averaged,
    begin_groups,
    count_step,
    fourth_root,
    is_written,
    larger,
    put,
    put_averaging,
    put_if,
    radam,
    row,
    smaller,
)  # fmt: skip

LIMIT = tl.constexpr(1.189207115002721)  # 2^(1/4)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["count"])
def begin_prodigy_plus(
    groups, count, ON: tl.constexpr, AT: tl.constexpr, ARGUMENTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What a step knows of its groups from its beginning on, and their coefficients. One program."""
    given, was, known, to = groups.given, groups.was, groups.known, groups.coefficients
    unsound = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        d, k = row(was, AT.was.d, count, i, here), row(was, AT.was.k, count, i, here)
        lr, beta1 = row(given, AT.given.lr, count, i, here), row(given, AT.given.beta1, count, i, here)
        beta2, decay = row(given, AT.given.beta2, count, i, here), row(given, AT.given.weight_decay, count, i, here)
        delta = d * lr
        if ON.takes_mean:
            shared = row(was, AT.was.shared_d, count, i, here)
            delta = tl.where(shared > 0.0, shared, d) * lr
        if ON.corrects:
            corrects = row(given, AT.given.use_bias_correction, count, i, here) > 0.0
            of_count, rectification = radam(k, beta2)
            beta2, delta = tl.where(corrects, of_count, beta2), tl.where(corrects, delta * rectification, delta)
        c, weight_sum = averaged(delta * delta, row(was, AT.was.weight_sum, count, i, here))
        constant = row(given, AT.given.schedulefree_c, count, i, here)
        c = tl.where(constant > 0.0, smaller(c * (1.0 - beta1) * constant, 1.0), c)
        q = 1.0 - beta1 * (1.0 - c)
        weight = d * d / tl.sqrt(row(given, AT.given.d0, count, i, here))
        steps = row(given, AT.given.prodigy_steps, count, i, here)

        adapts, speeds = (steps == 0.0) | (k < steps), row(given, AT.given.use_speed, count, i, here) > 0.0
        # Of its numbers d alone has to be finite.
        sound = begin_groups(groups, count, i, here, k, delta, c, q, adapts, speeds, k < 0.0, AT, ARGUMENTS, 1)
        unsound += tl.where(sound, 0.0, 1.0)
        put(known, AT.known.d, count, i, here, d)
        put(known, AT.known.beta2, count, i, here, beta2)
        put(known, AT.known.weight, count, i, here, weight)
        put(known, AT.known.weight_sum, count, i, here, weight_sum)

        by_lr = row(given, AT.given.weight_decay_by_lr, count, i, here) > 0.0
        of_d = row(given, AT.given.momentum_of_d, count, i, here) > 0.0
        fixed = row(given, AT.given.focus_fixed, count, i, here) > 0.0
        gain = tl.where(row(given, AT.given.gain_is_d, count, i, here) > 0.0, d, 1.0)
        keep = 1.0 - decay * tl.where(by_lr, delta, 1.0)
        put_averaging(groups, count, i, here, delta, c, q, beta1, decay, keep, gain, AT)
        put(to, AT.coefficients.d, count, i, here, d)
        put(to, AT.coefficients.d_eps, count, i, here, d * row(given, AT.given.eps, count, i, here))
        put(to, AT.coefficients.momentum_weight, count, i, here, (1.0 - beta1) * tl.where(of_d, d, 1.0))
        put(to, AT.coefficients.beta2, count, i, here, beta2)
        put(to, AT.coefficients.square_weight, count, i, here, (1.0 - beta2) * tl.where(fixed, 1.0, d * d))
        put(to, AT.coefficients.focus_correction, count, i, here, tl.full([BLOCK], 1.0, tl.float64))
        put(to, AT.coefficients.clamp, count, i, here, fourth_root(k))
        put(to, AT.coefficients.beta3, count, i, here, row(given, AT.given.beta3, count, i, here))
        put(to, AT.coefficients.s_weight, count, i, here, weight)
    tl.store(known + AT.known.unsound * count, tl.sum(unsound))


@triton.jit
def adapted(groups, count, i, here, total, largest, denominator, ON: tl.constexpr, AT: tl.constexpr):
    """d after a step (``ppsf_dist.algorithm.step_size``): ``total`` is the new numerator, ``largest`` of all."""
    given = groups.given
    d, d0 = row(groups.known, AT.known.d, count, i, here), row(given, AT.given.d0, count, i, here)
    d_coef, rate = row(given, AT.given.d_coef, count, i, here), row(given, AT.given.growth_rate, count, i, here)
    beta4 = row(given, AT.given.beta4, count, i, here)
    limits = row(given, AT.given.d_limiter, count, i, here) > 0.0
    most = tl.where((rate > 0.0) & (d != d0), rate * d, INFINITY)
    there = denominator > 0.0
    estimate = total / tl.where(there, denominator, 1.0)
    if ON.quirks:
        estimate = d_coef * tl.where(limits, smaller(d * LIMIT, estimate), estimate)
    else:
        estimate = d_coef * estimate
        estimate = tl.where(limits, smaller(d * LIMIT, estimate), estimate)
    estimate = smaller(estimate, most)
    averaged = beta4 * d + (1.0 - beta4) * larger(estimate, d0)
    found = tl.where(there, tl.where(beta4 > 0.0, averaged, larger(d, estimate)), d)
    if ON.speed:
        before = row(groups.was, AT.was.d_numerator, count, i, here)
        grows = (total >= largest) & (total > 0.0) & (before > 0.0)
        growth = smaller(tl.sqrt(tl.where(grows, total / tl.where(grows, before, 1.0), 1.0)), LIMIT)
        grown = larger(d, smaller(d * growth * tl.sqrt(fourth_root(d_coef)), most))
        speeds = row(given, AT.given.use_speed, count, i, here) > 0.0
        found = tl.where(speeds, tl.where(grows, grown, d), found)
    return found


@triton.jit(do_not_specialize=["count"])
def end_prodigy_plus(
    groups, totals, after, count, ON: tl.constexpr, AT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The numbers after a step from the totals of its parts. Of a void one what is counted. One program."""
    given, was, known = groups.given, groups.was, groups.known
    numerators, denominators = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    inverses, ok = tl.zeros([BLOCK], tl.float64), is_written(groups, totals, count, AT, BLOCK)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        weight = row(known, AT.known.weight, count, i, here)
        numerators += tl.where(here, row(totals, AT.total.numerator, count, i, here) * weight, 0.0)
        denominators += tl.where(here, row(totals, AT.total.denominator, count, i, here), 0.0)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        # With one d for all it is that of the first group.
        first = i * 0 if ON.pooled else i
        if ON.pooled:
            numerator, denominator = tl.sum(numerators) + i * 0.0, tl.sum(denominators) + i * 0.0
        else:
            weight = row(known, AT.known.weight, count, i, here)
            numerator = row(totals, AT.total.numerator, count, i, here) * weight
            denominator = row(totals, AT.total.denominator, count, i, here)
        d0, beta3 = row(given, AT.given.d0, count, first, here), row(given, AT.given.beta3, count, first, here)
        before, of_step = row(was, AT.was.d_numerator, count, first, here), row(known, AT.known.d, count, first, here)
        counts = (of_step > d0) | (numerator > 0.0)
        total = beta3 * before + tl.where(counts, numerator, 0.0)
        largest = larger(total, row(was, AT.was.max_d_numerator, count, first, here))
        adapts = walk.only_if(ok, row(known, AT.known.adapts, count, first, here) != 0.0)
        new_d = adapted(groups, count, first, here, total, largest, denominator, ON, AT)
        d = row(was, AT.was.d, count, i, here)
        new_d = tl.where(adapts, new_d, d)
        inverses += tl.where(here, 1.0 / new_d, 0.0)
        put(after, AT.was.d, count, i, here, new_d)
        put_if(groups, after, AT.was.d_prev, count, i, here, adapts, row(known, AT.known.d, count, i, here))
        put_if(groups, after, AT.was.d_numerator, count, i, here, adapts, total)
        put_if(groups, after, AT.was.d_denom, count, i, here, adapts, denominator)
        put_if(groups, after, AT.was.prev_d_numerator, count, i, here, adapts, before)
        put_if(groups, after, AT.was.max_d_numerator, count, i, here, adapts, largest)
        put(after, AT.was.shared_d, count, i, here, row(was, AT.was.shared_d, count, i, here))

        averages = row(given, AT.given.use_schedulefree, count, i, here) > 0.0
        moved = walk.only_if(ok, (row(totals, AT.total.moved, count, i, here) > 0.0) | (averages == 0))
        # Of an average that has been switched off nothing is left.
        weight_sum = tl.where(averages, row(known, AT.known.weight_sum, count, i, here), 0.0)
        put_if(groups, after, AT.was.weight_sum, count, i, here, moved, weight_sum)
        q = tl.where(averages, row(known, AT.known.q, count, i, here), 1.0)
        lr = row(given, AT.given.lr, count, i, here)
        put_if(groups, after, AT.was.effective_lr, count, i, here, moved, lr * q)
        count_step(groups, totals, after, count, i, here, ok, AT)
    if ON.averages_d:
        if ok:
            mean = count.to(tl.float64) / tl.sum(inverses)
            for start in range(0, count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                put(after, AT.was.shared_d, count, i, i < count, mean + i * 0.0)
