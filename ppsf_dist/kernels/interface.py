"""What the three passes read and what they return. Every backend implements :class:`Kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from torch import Tensor

from ppsf_dist.kernels.writes import Writes
from ppsf_dist.work import Work


class Stat(IntEnum):
    """Columns of the table of sums: one row for each parameter, fp64."""

    PRESENT = 0
    """How many ranks have a gradient."""
    LARGEST_SQUARE = 1
    """Sum over pieces of their largest g^2 (or sum of g^2 in a row): not finite if the square of any element is not."""
    DOT = 2
    """Sum of g (p0 - point) over the samples."""
    S_L1 = 3
    """Sum of |s| over the samples, after this step."""
    DELTA_L1 = 4
    """Sum of |p0 - point| over the samples."""
    DELTA_SQUARE = 5
    """Sum of (p0 - point)^2 over the samples."""
    EARLY_MASK = 6
    """Number of elements whose gradient and momentum agree."""
    UU = 7
    """Sum of u^2, in units of ``Coefficients.gain``."""
    WW = 8
    """Sum of w^2."""
    WU = 9
    """Sum of w u."""
    LATE_MASK = 10
    """Number of elements whose finished update and step of y agree."""


class Coefficients(NamedTuple):
    """Numbers that scale the formulas, one for each parameter: fp32 vectors over parameters."""

    d: Tensor
    d_eps: Tensor
    beta1: Tensor
    momentum_weight: Tensor
    beta2: Tensor
    square_weight: Tensor
    focus_correction: Tensor
    clamp: Tensor
    delta: Tensor
    c: Tensor
    q: Tensor
    weight_decay: Tensor
    keep: Tensor
    beta3: Tensor
    s_weight: Tensor


class Scales(NamedTuple):
    """Numbers that follow from this step's sums, one for each parameter: fp32 vectors over parameters.

    The finished direction is ``amount * u - pull * w``.
    """

    amount: Tensor
    pull: Tensor
    mask: Tensor
    advance: Tensor
    """``amount * delta``"""


@dataclass(frozen=True)
class Gates:
    """Which parameters are written, decided on the device.

    Attributes:
        moments: bool vector over parameters: the second moment is updated.
        weights: bool vector: everything else is.
        known: both as lists where the host may read them without waiting (parameters on a CPU), else None.
    """

    moments: Tensor
    weights: Tensor
    known: Sequence[Sequence[bool]] | None


class Kernels(Protocol):
    """The passes. 1 and 2 only read; 3 writes everything.

    Args of each: ``stats`` is the table of sums (parameters by :class:`Stat`), added to in place; ``coefficients`` is
    the stacked :class:`Coefficients`; ``factors`` is the flat buffer of square roots of the factored moments.
    """

    def pass_1(self, works: Sequence[Work], coefficients: Tensor, factors: Tensor, sums: Tensor, stats: Tensor) -> None:
        """Sums of g^2 by row and column into ``sums`` (flat, fp32), and all sums that need nothing of this step."""

    def pass_2(self, works: Sequence[Work], coefficients: Tensor, factors: Tensor, stats: Tensor) -> None:
        """Norms of the direction and its angle with the weights."""

    def count_masks(
        self, works: Sequence[Work], coefficients: Tensor, factors: Tensor, scales: Tensor, stats: Tensor
    ) -> None:
        """Size of the mask of the schedule-free cautious update."""

    def pass_3(
        self,
        works: Sequence[Work],
        coefficients: Tensor,
        factors: Tensor,
        scales: Tensor,
        gates: Gates,
        keys: Tensor,
        writes: Writes,
    ) -> None:
        """Write y, z, the elementwise moments and s, through ``writes``: an exception in here is a pause.

        Called again with the same arguments it goes on where the exception has ended it.
        """
