"""One element: how it is read and how it is rounded. Same bits as ``cpu/element.h`` and ``algorithm/rounding.py``.

Triton's own conversion to bf16 is not used: its interpreter cuts where a GPU rounds.
"""

import triton
import triton.language as tl

HIGH_HALF = tl.constexpr(0xFFFF0000)
# Of the bits 0x7F7F0000.
LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
QUIET_NAN = tl.constexpr(0x7FC00000)
ATAN2_SCALE = tl.constexpr(1.2732395)
TAN_OF_EIGHTH = tl.constexpr(0.41421356237309503)
QUARTER_PI = tl.constexpr(0.78539816339744831)
TERMS = tl.constexpr(13)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def nearest(x):
    """The bits of fp32 ``x`` rounded to bf16, ties to even, as torch rounds."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & HIGH_HALF
    return tl.where(x != x, tl.full(bits.shape, QUIET_NAN, tl.uint32), rounded)


@triton.jit
def as_bf16(x):
    return nearest(x).to(tl.float32, bitcast=True)


@triton.jit
def stochastic(x, random):
    """The bits of ``x`` with 16 random ones added below bf16's last place, where the sum stays finite."""
    bits = bits_of(x)
    return tl.where(tl.abs(x) < LARGEST_BF16, bits + random, bits)


@triton.jit
def upper_half(bits):
    """The bf16 that is the upper half of 32 bits."""
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def mix(x):
    """The hash of ``ppsf_dist.algorithm.rounding``, of uint32."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def put(at, x, mask, HALF: tl.constexpr):
    """Store fp32 in its dtype, rounded to the nearest."""
    if HALF:
        tl.store(at, upper_half(nearest(x)), mask=mask)
    else:
        tl.store(at, x, mask=mask)


@triton.jit
def put_stochastic(at, x, mask, random):
    """Store fp32 as bf16, rounded up or down by 16 random bits."""
    tl.store(at, upper_half(stochastic(x, random)), mask=mask)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def largest_of(bits):
    """Of a tile of bits of numbers that are not negative: the largest, not finite if one of them is not. fp64."""
    return tl.max(bits).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def total(x):
    """Sum of a tile, in fp64."""
    return tl.sum(x.to(tl.float64))


@triton.jit
def scaled_atan2(a, b):
    """``4/pi atan2(a, b)`` for ``b >= 0``, in fp64, so that one rounding remains. As in ``cpu/element.h``."""
    size = tl.abs(a.to(tl.float64))
    other = b.to(tl.float64)
    steep = size > other
    low = tl.where(steep, other, size)
    high = tl.where(steep, size, other)
    ratio = low / tl.where(high > 0, high, 1.0)
    folds = ratio > TAN_OF_EIGHTH
    t = tl.where(folds, (ratio - 1.0) / (ratio + 1.0), ratio)
    square = t * t
    series = tl.zeros_like(t)
    for k in tl.static_range(TERMS):
        series = (1.0 - 2.0 * ((TERMS - 1 - k) % 2)) / (2.0 * (TERMS - 1 - k) + 1.0) + square * series
    angle = t * series + tl.where(folds, QUARTER_PI, 0.0)
    angle = tl.where(steep, 2 * QUARTER_PI - angle, angle).to(tl.float32)
    return tl.where(a < 0, -angle, angle) * ATAN2_SCALE
