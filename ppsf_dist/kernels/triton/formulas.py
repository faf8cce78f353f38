"""The formulas on a tile, in the order of operations of ``cpu/block.h``, so that the bits agree.

ON says which run, ROWS where the coefficients stand (``ppsf_dist.kernels.triton.tables``); each combination is
compiled once. Products and sums are fused where ``tl.fma`` says so and nowhere else: launches switch the compiler's own
fusing off.
"""

import triton
import triton.language as tl

from ppsf_dist.kernels.triton.element import as_bf16, scaled_atan2, sign
from ppsf_dist.kernels.triton.tables import Numbers

AMOUNT = tl.constexpr(0)
MASK = tl.constexpr(2)
ADVANCE = tl.constexpr(3)


@triton.jit
def number(plan, slot, ROW: tl.constexpr):
    """A coefficient of a parameter; 0 where the method has none of that name."""
    if ROW < 0:
        value = slot.to(tl.float32) * 0
    else:
        value = tl.load(plan.coefficients + ROW * tl.load(plan.sizes) + slot)
    return value


@triton.jit
def scale(plan, slot, NAME: tl.constexpr):
    """One of ``ppsf_dist.kernels.interface.Scales``."""
    return tl.load(plan.scales + NAME * tl.load(plan.sizes) + slot)


@triton.jit
def numbers_of(plan, slot, ROWS: tl.constexpr):
    """What the formulas take of a parameter, read once: no read moves before a write, so none may be in a loop.

    The compiler leaves out what is not used.
    """
    return Numbers(
        delta=number(plan, slot, ROWS.delta),
        c=number(plan, slot, ROWS.c),
        q=number(plan, slot, ROWS.q),
        beta1=number(plan, slot, ROWS.beta1),
        weight_decay=number(plan, slot, ROWS.weight_decay),
        keep=number(plan, slot, ROWS.keep),
        d=number(plan, slot, ROWS.d),
        d_eps=number(plan, slot, ROWS.d_eps),
        momentum_weight=number(plan, slot, ROWS.momentum_weight),
        beta2=number(plan, slot, ROWS.beta2),
        square_weight=number(plan, slot, ROWS.square_weight),
        beta3=number(plan, slot, ROWS.beta3),
        s_weight=number(plan, slot, ROWS.s_weight),
        root=number(plan, slot, ROWS.root),
        amount=scale(plan, slot, AMOUNT),
        mask=scale(plan, slot, MASK),
        advance=scale(plan, slot, ADVANCE),
    )


@triton.jit
def ema(old, beta, weight, x, IN_BF16: tl.constexpr):
    """``beta * old + weight * x``, rounded as it is stored: once, or twice in 16 bits."""
    if IN_BF16:
        after = as_bf16(as_bf16(old * beta) + x * weight)
    else:
        after = tl.fma(x, weight, old * beta)
    return after


@triton.jit
def momentum(g, m, of, ON: tl.constexpr):
    return ema(m, of.beta1, of.momentum_weight, g, ON.weights_in_bf16)


@triton.jit
def direction(g, m, v, root, of, ON: tl.constexpr, EXACT: tl.constexpr):
    """The direction in units of gain, and momentum and second moment after the step.

    ``root`` is that of the factored second moment. EXACT: whether the quotient is rounded as on a CPU, or off by up to
    two units in its last place at a third of the instructions.
    """
    u = g
    if ON.second_moment:
        if ON.factored:
            u = root
        else:
            v = ema(v, of.beta2, of.square_weight, g * g, ON.weights_in_bf16)
            u = tl.sqrt_rn(v)
            if ON.weights_in_bf16:
                u = as_bf16(u)
            if ON.sgd_phase:
                u = u * of.root
        numerator = g
        if ON.momentum and not ON.schedulefree:
            m = momentum(g, m, of, ON)
            numerator = m
            if ON.cautious:
                numerator = m * tl.where(g * m > 0, 1.0, 0.0)
            elif ON.grams:
                numerator = sign(g) * tl.abs(m)
        elif ON.atan2:
            numerator = g * of.d
        if ON.atan2:
            u = scaled_atan2(numerator, u)
        elif EXACT:
            u = tl.div_rn(numerator, u + of.d_eps)
        else:
            u = numerator / (u + of.d_eps)
    return u, m, v


@triton.jit
def finish(u, y, of, ON: tl.constexpr):
    """The direction with StableAdamW, the early mask and the weight decay of Schedule-Free."""
    u = u * of.amount
    if ON.schedulefree and ON.decays and ON.decays_by_lr:
        u = tl.fma(y, of.weight_decay, u)
    return u


@triton.jit
def masked_step(u, y, z, of):
    """The step of y, to be subtracted, under the Schedule-Free forms of cautious and Grams."""
    share = of.q * of.delta
    return tl.fma(u, share, (y - z) * of.c)


@triton.jit
def lerp(a, b, weight):
    """``torch.lerp``."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1), b - a, tl.where(near, a, b))


@triton.jit
def move(u, y, z, of, ON: tl.constexpr):
    """y and z after a step along u."""
    new_z = z
    if not ON.schedulefree:
        u = finish(u, y, of, ON)
        if ON.decays:
            new_y = y * of.keep - u * of.delta
        else:
            new_y = y - u * of.delta
    else:
        if ON.cautious or ON.grams:
            u = finish(u, y, of, ON)
            step = masked_step(u, y, z, of)
            if ON.cautious:
                new_y = y - step * tl.where(u * step > 0, 1.0, 0.0) * of.mask
            else:
                new_y = y - tl.abs(step) * sign(u)
            u = u * of.delta
        else:
            if ON.decays:
                u = finish(u, y, of, ON) * of.delta
            else:
                u = u * of.advance
            new_y = tl.fma(-u, of.q, lerp(y, z, of.c))
        new_z = z - u
        if ON.decays and not ON.decays_by_lr:
            new_z = tl.fma(-y, of.weight_decay, new_z)
            new_y = tl.fma(-y, of.weight_decay * of.q, new_y)
    return new_y, new_z


@triton.jit
def gradient_sum(g, s, of, ON: tl.constexpr):
    """Prodigy's s after this step."""
    weight = of.s_weight
    if ON.samples_in_bf16:
        if ON.weights_in_bf16:
            # Where both have it, torch rounds the weight to their dtype.
            weight = as_bf16(weight)
        after = as_bf16(as_bf16(s * of.beta3) + g * weight)
    else:
        after = s * of.beta3 + g * weight
    return after
