"""The sums of a step: the columns of the table that all ranks add up."""

from __future__ import annotations

from enum import IntEnum


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
    """Sum of u^2, in units of the direction before ``ppsf_dist.kernels.interface.Scales``."""
    WW = 8
    """Sum of w^2."""
    WU = 9
    """Sum of w u."""
    LATE_MASK = 10
    """Number of elements whose finished update and step of y agree."""
    GG = 11
    """Sum of g^2."""
