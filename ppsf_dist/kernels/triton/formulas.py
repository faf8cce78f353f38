"""The formulas on a tile, in the order of operations of ``cpu/block.h``, so that the bits agree.

ON says which run, ROWS where the coefficients stand (``ppsf_dist.kernels.triton.tables``); each combination is
compiled once. Products and sums are fused where ``tl.fma`` says so and nowhere else: launches switch the compiler's own
fusing off.
"""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton.element import as_bf16, scaled_atan2, sign

AMOUNT = tl.constexpr(0)
MASK = tl.constexpr(2)
ADVANCE = tl.constexpr(3)


@triton.jit
def number(plan, slot, ROW: tl.constexpr):
    """A coefficient of a parameter."""
    return tl.load(plan.coefficients + ROW * tl.load(plan.sizes) + slot)


@triton.jit
def scale(plan, slot, NAME: tl.constexpr):
    """One of ``ppsf_dist.kernels.interface.Scales``."""
    return tl.load(plan.scales + NAME * tl.load(plan.sizes) + slot)


@triton.jit
def ema(old, beta, weight, x, IN_BF16: tl.constexpr):
    """``beta * old + weight * x``, rounded as it is stored: once, or twice in 16 bits."""
    if IN_BF16:
        after = as_bf16(as_bf16(old * beta) + x * weight)
    else:
        after = tl.fma(x, weight, old * beta)
    return after


@triton.jit
def momentum(g, m, plan, slot, ROWS: tl.constexpr, ON: tl.constexpr):
    beta1 = number(plan, slot, ROWS.beta1)
    return ema(m, beta1, number(plan, slot, ROWS.momentum_weight), g, ON.weights_in_bf16)


@triton.jit
def direction(g, m, v, root, plan, slot, ROWS: tl.constexpr, ON: tl.constexpr):
    """The direction in units of gain, and momentum and second moment after the step.

    ``root`` is that of the factored second moment.
    """
    u = g
    if ON.second_moment:
        if ON.factored:
            u = root
        else:
            weight = number(plan, slot, ROWS.square_weight)
            v = ema(v, number(plan, slot, ROWS.beta2), weight, g * g, ON.weights_in_bf16)
            u = tl.sqrt_rn(v)
            if ON.weights_in_bf16:
                u = as_bf16(u)
            if ON.sgd_phase:
                u = u * number(plan, slot, ROWS.root)
        numerator = g
        if ON.momentum and not ON.schedulefree:
            m = momentum(g, m, plan, slot, ROWS, ON)
            numerator = m
            if ON.cautious:
                numerator = m * tl.where(g * m > 0, 1.0, 0.0)
            elif ON.grams:
                numerator = sign(g) * tl.abs(m)
        elif ON.atan2:
            numerator = g * number(plan, slot, ROWS.d)
        if ON.atan2:
            u = scaled_atan2(numerator, u)
        else:
            u = tl.div_rn(numerator, u + number(plan, slot, ROWS.d_eps))
    return u, m, v


@triton.jit
def finish(u, y, plan, slot, ROWS: tl.constexpr, ON: tl.constexpr):
    """The direction with StableAdamW, the early mask and the weight decay of Schedule-Free."""
    u = u * scale(plan, slot, AMOUNT)
    if ON.schedulefree and ON.decays and ON.decays_by_lr:
        u = tl.fma(y, number(plan, slot, ROWS.weight_decay), u)
    return u


@triton.jit
def masked_step(u, y, z, plan, slot, ROWS: tl.constexpr):
    """The step of y, to be subtracted, under the Schedule-Free forms of cautious and Grams."""
    share = number(plan, slot, ROWS.q) * number(plan, slot, ROWS.delta)
    return tl.fma(u, share, (y - z) * number(plan, slot, ROWS.c))


@triton.jit
def lerp(a, b, weight):
    """``torch.lerp``."""
    return tl.where(weight < 0.5, tl.fma(weight, b - a, a), tl.fma(weight - 1, b - a, b))


@triton.jit
def move(u, y, z, plan, slot, ROWS: tl.constexpr, ON: tl.constexpr):
    """y and z after a step along u."""
    delta = number(plan, slot, ROWS.delta)
    new_z = z
    if not ON.schedulefree:
        u = finish(u, y, plan, slot, ROWS, ON)
        if ON.decays:
            new_y = y * number(plan, slot, ROWS.keep) - u * delta
        else:
            new_y = y - u * delta
    else:
        q = number(plan, slot, ROWS.q)
        if ON.cautious or ON.grams:
            u = finish(u, y, plan, slot, ROWS, ON)
            step = masked_step(u, y, z, plan, slot, ROWS)
            if ON.cautious:
                new_y = y - step * tl.where(u * step > 0, 1.0, 0.0) * scale(plan, slot, MASK)
            else:
                new_y = y - tl.abs(step) * sign(u)
            u = u * delta
        else:
            if ON.decays:
                u = finish(u, y, plan, slot, ROWS, ON) * delta
            else:
                u = u * scale(plan, slot, ADVANCE)
            new_y = tl.fma(-u, q, lerp(y, z, number(plan, slot, ROWS.c)))
        new_z = z - u
        if ON.decays and not ON.decays_by_lr:
            decay = number(plan, slot, ROWS.weight_decay)
            new_z = tl.fma(-y, decay, new_z)
            new_y = tl.fma(-y, decay * q, new_y)
    return new_y, new_z


@triton.jit
def gradient_sum(g, s, plan, slot, ROWS: tl.constexpr, ON: tl.constexpr):
    """Prodigy's s after this step."""
    beta3, weight = number(plan, slot, ROWS.beta3), number(plan, slot, ROWS.s_weight)
    if ON.samples_in_bf16:
        if ON.weights_in_bf16:
            # Where both have it, torch rounds the weight to their dtype.
            weight = as_bf16(weight)
        after = as_bf16(as_bf16(s * beta3) + g * weight)
    else:
        after = s * beta3 + g * weight
    return after
