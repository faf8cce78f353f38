"""Second moments: factored as in Adafactor, or one number for each element.

Factored moments keep, for a parameter of shape n1 x ... x nm, one vector of row means R (averaged over the largest
axis, dr) and one of column means C (averaged over the second largest, dc) of the squared gradient.

Sources: Shazeer and Stern, "Adafactor", arXiv:1804.04235, section 3; the weight d^2 of each square is Prodigy's
(Mishchenko and Defazio, arXiv:2306.06101, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR_MIN_DIM = 32
"""A tensor is factored only if at least one axis is this long."""

ROW_MEAN_GUARD = 1e-30
"""Added to the mean of R before dividing by it, in units of d^2 g^2."""


@dataclass(frozen=True)
class Factoring:
    """How one logical shape is factored: ``dr`` and ``dc`` are the axes that R and C average over."""

    shape: tuple[int, ...]
    dr: int
    dc: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(1 if axis == self.dr else n for axis, n in enumerate(self.shape))

    @property
    def col_shape(self) -> tuple[int, ...]:
        return tuple(1 if axis == self.dc else n for axis, n in enumerate(self.shape))

    def mean_axis(self, *, quirks: bool) -> int:
        """The axis of R whose mean normalises R.

        Adafactor's is dc. The reference takes ``dc - 1`` when dc > dr, the position that dc would have if R had lost
        its averaged axis; R has not, so tall matrices divide R by itself (``docs/differences.md``, O3).
        """
        return self.dc - 1 if quirks and self.dc > self.dr else self.dc


def factoring(shape: Sequence[int]) -> Factoring | None:
    """Axes for a logical shape, or None if its second moment is kept for each element.

    Axes are ranked by (size, index): the last is dr and the one before it dc, so ties go to the higher index.
    """
    if len(shape) < 2 or max(shape) < FACTOR_MIN_DIM or 0 in shape:
        return None
    ranked = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    return Factoring(tuple(shape), dr=ranked[-1], dc=ranked[-2])


def ema_(old: Tensor, beta2: Tensor, weight: Tensor, square: Tensor) -> Tensor:
    """``beta2 * old + weight * square`` into ``old`` (fp32), with ``weight = (1 - beta2) d^2``."""
    return old.mul_(beta2).addcmul_(square, weight)


def ema_low_precision(old: Tensor, beta2: Tensor, weight: Tensor, square: Tensor) -> Tensor:
    """The same for a moment stored in 16 bits: rounded after the decay and again after the sum, as it is stored."""
    decayed = (old.float() * beta2).to(old.dtype)
    return (decayed.float() + square * weight).to(old.dtype)


def row_scale(row: Tensor, mean: Tensor) -> Tensor:
    """Square root of ``R / mean(R)``: the row's factor of the denominator. Both fp32, same shape."""
    return torch.sqrt_(row / (mean + ROW_MEAN_GUARD))


def bias_correction(k: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
    """Adam's, of both moments: ``sqrt(1 - beta2^k) / (1 - beta1^k)``, for vectors over groups (fp64).

    Args:
        k: 1-based step.
        beta1, beta2: decays of the moments. Kingma and Ba, arXiv:1412.6980, section 3.
    """
    return (1 - beta2**k).sqrt() / (1 - beta1**k)


def radam(k: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
    """RAdam's bias-corrected beta2 and its rectification of the step, for vectors over groups (fp64).

    Args:
        k: 1-based step.
        beta2: decay of the second moment.

    Returns:
        ``1 - (1 - beta2) / (1 - beta2^k)``, and the rectification, which is 0 while the variance is intractable
        (rho <= 4). Liu et al., arXiv:1908.03265, algorithm 2.
    """
    power = beta2**k
    corrected = 1 - (1 - beta2) / (1 - power)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * k * power / (1 - power)
    variance = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    tractable = rho > 4
    return corrected, torch.where(tractable, variance, torch.zeros_like(variance)).clamp_min(0).sqrt()
