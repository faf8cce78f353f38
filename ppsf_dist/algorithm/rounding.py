"""Stochastic rounding to bf16 from a hash, so that it depends on what is rounded and not on where.

The 16 random bits of an element come from (seed, step, parameter, global element index): replicas agree, shards agree
with the whole, and a resumed run agrees with an uninterrupted one. One 32-bit hash serves both sequences of the
optimizer: y takes its upper half, z its lower half.

The mixer is a 32-bit integer finaliser of the xor-shift-multiply family with the multipliers that Ettinger's search
for low bias found (https://github.com/skeeto/hash-prospector). Everything is int32 with wrapping products, so any
backend computes the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_1 = 0x21F0AAAD
_MULTIPLIER_2 = 0xD35A2D97 - (1 << 32)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_32 = 0xFFFFFFFF
_KEEP_HIGH_HALF = -65536
_SIGN_32 = 1 << 31
_LARGEST = torch.finfo(torch.bfloat16).max


def _logical_shift_(x: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """``x >> bits`` without sign extension, into ``scratch``."""
    torch.bitwise_right_shift(x, bits, out=scratch)
    return scratch.bitwise_and_((1 << (32 - bits)) - 1)


def mix_(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Hash int32 values in place: every output bit depends on every input bit."""
    scratch = torch.empty_like(x) if scratch is None else scratch
    x.bitwise_xor_(_logical_shift_(x, 16, scratch)).mul_(_MULTIPLIER_1)
    x.bitwise_xor_(_logical_shift_(x, 15, scratch)).mul_(_MULTIPLIER_2)
    return x.bitwise_xor_(_logical_shift_(x, 15, scratch))


def keys(seed: int, step: Tensor, parameter: Tensor) -> Tensor:
    """One int32 key for each parameter.

    Args:
        seed: the optimizer's ``seed``.
        step: int64 vector over parameters, the number of updates each has had.
        parameter: int64 vector, the number of each parameter among all of the optimizer.
    """
    key = low_32_bits(step + folded(seed))
    mix_(key)
    return mix_(key.bitwise_xor_(low_32_bits(parameter * 0x632BE5AB)))


def folded(seed: int) -> int:
    """The 32 bits of a seed that are added to a step."""
    return (seed * _GOLDEN) & _MASK_32


def low_32_bits(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values as int32."""
    low = x.bitwise_and(_MASK_32)
    return (low - (low >= _SIGN_32).long().mul_(1 << 32)).to(torch.int32)


def round_half_(x: Tensor, random: Tensor) -> Tensor:
    """Round fp32 ``x`` stochastically to values that bf16 holds exactly, in place.

    Adds 16 random bits below bf16's last place and cuts there, so the expectation is ``x``. Infinities and NaN stay
    as they are: adding to their bit pattern would turn them into something else. A finite ``x`` stays finite.

    Args:
        x: fp32.
        random: int32 in [0, 65535], overwritten.
    """
    random.add_(x.view(torch.int32)).bitwise_and_(_KEEP_HIGH_HALF)
    # Near the top of the range the sum carries into the exponent of infinity.
    rounded = random.view(torch.float32).clamp_(-_LARGEST, _LARGEST)
    return torch.where(x.isfinite(), rounded, x, out=x)


def high_half(bits: Tensor) -> Tensor:
    """Upper 16 bits of a hash, for y."""
    return bits.bitwise_right_shift(16).bitwise_and_(0xFFFF)


def low_half(bits: Tensor) -> Tensor:
    """Lower 16 bits of a hash, for z."""
    return bits.bitwise_and(0xFFFF)
