"""The direction u of a step: gradient over denominator, and the variants that change it.

Every function works on fp32 tiles; the scalars it takes are fp32 tensors that broadcast against the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATAN2_SCALE = 1.2732395
"""4 / pi: makes the slope of the atan2 form 1 for small ratios (arXiv:2407.05872)."""

FOCUS_GAMMA = 0.1
"""Pull towards the average of the weights in FOCUS (arXiv:2501.12243)."""

NORM_GUARD = 1e-30
"""Keeps OrthoGrad's divisions finite."""

ORTHOGONAL_FLOOR = 1e-6
"""OrthoGrad leaves u alone if less than this fraction of it is orthogonal to w: what remains is rounding noise."""

MASK_FLOOR = 1e-3
"""Smallest fraction of elements that the cautious mask divides by."""


def divide_(denominator: Tensor, numerator: Tensor, eps: Tensor) -> Tensor:
    """``numerator / (denominator + eps)``; ``eps`` is d * eps of the group."""
    return torch.div(numerator, denominator.add_(eps), out=denominator)


def atan2_(denominator: Tensor, numerator: Tensor) -> Tensor:
    """``4/pi * atan2(numerator, denominator)``: bounded, without an epsilon (arXiv:2407.05872)."""
    return torch.atan2(numerator, denominator, out=denominator).mul_(ATAN2_SCALE)


def focus(numerator: Tensor, weights: Tensor, average: Tensor) -> Tensor:
    """``sign(numerator) + 0.1 sign(w - average of w)`` (arXiv:2501.12243, algorithm 1)."""
    return numerator.sign().add_((weights - average).sign_(), alpha=FOCUS_GAMMA)


def grams_momentum(gradient: Tensor, momentum: Tensor) -> Tensor:
    """Sign of the gradient, size of the momentum (Grams, arXiv:2412.17107, without schedule-free)."""
    return gradient.sign().mul_(momentum.abs())


def aligned(a: Tensor, b: Tensor) -> Tensor:
    """1 where ``a`` and ``b`` have the same sign, else 0 (the mask of cautious optimizers, arXiv:2411.16085)."""
    return (a * b > 0).to(a.dtype)


def mask_scale(count: Tensor, numel: Tensor) -> Tensor:
    """``1 / max(mean of the mask, 1e-3)`` from the number of aligned elements of the whole parameter (fp64)."""
    return 1 / (count / numel).clamp_min(MASK_FLOOR)


def soft_rms_scale(square_sum: Tensor, numel: Tensor) -> Tensor:
    """StableAdamW's bound in its soft form, ``1 / sqrt(max(RMS(u), 1))``, for vectors over parameters (fp64).

    The reference divides by the square root of the RMS (arXiv:2304.13013 divides by the RMS itself).
    """
    return 1 / (square_sum / numel).sqrt().clamp_min(1).sqrt()


def orthogonal_scales(uu: Tensor, ww: Tensor, wu: Tensor, numel: Tensor) -> tuple[Tensor, Tensor]:
    """OrthoGrad as two numbers for each parameter: ``u <- keep * u - pull * w`` (arXiv:2501.04697, section 4).

    The part of u orthogonal to the weights w, stretched back to the length of u. Its length comes from the three
    sums, ``|v|^2 = uu - wu^2 (2 / (ww + g) - ww / (ww + g)^2)``, so it costs no reduction of its own.

    Args:
        uu, ww, wu: sums of u u, w w and w u over the whole parameter (fp64 vectors over parameters).
        numel: elements of the whole parameter; a single element has no orthogonal direction and keeps its u.
    """
    guarded = ww + NORM_GUARD
    vv = (uu - wu * wu * (2 / guarded - ww / (guarded * guarded))).clamp_min(0)
    keep = uu.sqrt() / (vv.sqrt() + NORM_GUARD)
    defined = (ww.sqrt() > NORM_GUARD) & (numel > 1) & (vv.sqrt() > ORTHOGONAL_FLOOR * uu.sqrt())
    return torch.where(defined, keep, torch.ones_like(keep)), torch.where(
        defined, keep * wu / guarded, torch.zeros_like(keep)
    )
