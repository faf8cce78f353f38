"""The numbers of groups of the Schedule-Free optimizers (``ppsf_dist.methods.schedulefree``)."""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton.numbers import (
    averaged,
    begin_groups,
    count_step,
    is_written,
    larger,
    power,
    put,
    put_averaging,
    put_if,
    radam,
    row,
    smaller,
)  # fmt: skip


@triton.jit
def raised(base, exponent):
    """``base^exponent`` of whole numbers: of others Python takes torch's."""
    raised_ = power(base, tl.abs(exponent))
    return tl.where(exponent < 0.0, 1.0 / tl.where(exponent < 0.0, raised_, 1.0), raised_)


@triton.jit(do_not_specialize=["count"])
def begin_schedulefree(
    groups, count, ON: tl.constexpr, AT: tl.constexpr, ARGUMENTS: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a step knows of its groups from its beginning on, and their coefficients. One program."""
    given, was, known, to = groups.given, groups.was, groups.known, groups.coefficients
    unsound = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        k, beta1 = row(was, AT.was.k, count, i, here), row(given, AT.given.beta1, count, i, here)
        lr, decay = row(given, AT.given.lr, count, i, here), row(given, AT.given.weight_decay, count, i, here)
        steps = k + 1.0
        as_sgd = k != k
        if ON.radam:
            schedule = radam(steps, row(given, AT.given.beta2, count, i, here))[1]
            as_sgd = (schedule == 0.0) & (row(given, AT.given.silent_sgd_phase, count, i, here) == 0.0)
            schedule = tl.where(as_sgd, 1.0, schedule)
        else:
            schedule = smaller(steps / larger(row(given, AT.given.warmup_steps, count, i, here), 1.0), 1.0)
        delta = lr * schedule
        lr_max = larger(delta, row(was, AT.was.lr_max, count, i, here))
        weight = raised(steps, row(given, AT.given.r, count, i, here))
        weight *= raised(lr_max, row(given, AT.given.weight_lr_power, count, i, here))
        c, weight_sum = averaged(weight, row(was, AT.was.weight_sum, count, i, here))
        q = 1.0 - beta1 * (1.0 - c)
        sound = begin_groups(groups, count, i, here, k, delta, c, q, k == k, k != k, k != k, AT, ARGUMENTS, ADAPTIVE)
        unsound += tl.where(sound, 0.0, 1.0)
        put(known, AT.known.weight_sum, count, i, here, weight_sum)
        put(known, AT.known.lr_max, count, i, here, lr_max)

        gain, keep = k * 0.0 + 1.0, 1.0 - decay * delta
        if ON.adam:
            # g / (sqrt(V / correction) + eps) in terms of the root that is there.
            beta2, eps = row(given, AT.given.beta2, count, i, here), row(given, AT.given.eps, count, i, here)
            root = tl.sqrt(1.0 - power(beta2, steps))
            gain = tl.where(as_sgd, 1.0, root)
            put(to, AT.coefficients.d_eps, count, i, here, tl.where(as_sgd, 1.0, eps * root))
            put(to, AT.coefficients.beta2, count, i, here, beta2)
            put(to, AT.coefficients.square_weight, count, i, here, 1.0 - beta2)
        if ON.radam:
            put(to, AT.coefficients.root, count, i, here, tl.where(as_sgd, 0.0, 1.0))
        put_averaging(groups, count, i, here, delta, c, q, beta1, decay, keep, gain, AT)
    tl.store(known + AT.known.unsound * count, tl.sum(unsound))


@triton.jit(do_not_specialize=["count"])
def end_schedulefree(groups, totals, after, count, ON: tl.constexpr, AT: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers after a step from the totals of its parts. Of a void one what is counted. One program."""
    known, ok = groups.known, is_written(groups, totals, count, AT, BLOCK)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < count
        count_step(groups, totals, after, count, i, here, ok, AT)
        put_if(groups, after, AT.was.weight_sum, count, i, here, ok, row(known, AT.known.weight_sum, count, i, here))
        put_if(groups, after, AT.was.lr_max, count, i, here, ok, row(known, AT.known.lr_max, count, i, here))
        put_if(groups, after, AT.was.scheduled_lr, count, i, here, ok, row(known, AT.known.delta, count, i, here))
