"""What a backend is told of a shard: the numbers and flags that Python shares with C++ and with Triton.

The mirror of ``cpu/plan.h``; the library is asked for its sizes when it is loaded.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from enum import IntEnum, IntFlag

MOST_AXES = 7

ADDRESSES = ("weights", "gradient", "z", "exp_avg", "exp_avg_sq", "p0", "s", "packed z")
"""What lies where: the columns of the table of addresses."""

COEFFICIENTS = (
    "delta", "c", "q", "beta1", "weight_decay", "keep", "d", "d_eps", "momentum_weight", "beta2", "square_weight",
    "beta3", "s_weight", "root",
)  # fmt: skip
"""The coefficients that the formulas know, by the names that methods give them."""

KNOWN = ("k", "delta", "c", "q", "adapts", "speeds", "pauses", "moves", "unsound")
"""What a step of every method knows of a group from its beginning on: the first rows of a table of fp64."""

TRAITS = ("stableadamw", "measured", "early_mask", "late_mask", "rounds_samples", "rounds_s")
"""Of a parameter, by ``ppsf_dist.engine.part_numbers.Traits``: bits of a number, from the lowest."""


class Flag(IntFlag):
    """Which formulas run on a piece, and what it is."""

    OWNED = 1 << 0
    FACTORED = 1 << 1
    SCHEDULEFREE = 1 << 2
    MOMENTUM = 1 << 3
    SECOND_MOMENT = 1 << 4
    SGD_PHASE = 1 << 5
    STATISTICS = 1 << 6
    SPEED = 1 << 7
    DECAYS = 1 << 8
    DECAYS_BY_LR = 1 << 9
    COUPLED_DECAY = 1 << 10
    ATAN2 = 1 << 11
    NEEDS_NORMS = 1 << 12
    CAUTIOUS = 1 << 13
    GRAMS = 1 << 14
    STOCHASTIC = 1 << 15
    WEIGHTS_IN_BF16 = 1 << 16
    SAMPLES_IN_BF16 = 1 << 17
    MATRIX = 1 << 18
    FLAT = 1 << 19


Axes = c_int64 * MOST_AXES


class Piece(ctypes.Structure):
    """A box of a parameter as lines along its last axis."""

    _fields_ = [
        *[(name, c_int64) for name in ("slot", "flags", "slice_p", "shard", "round", "first", "first_sample")],
        *[(name, c_int64) for name in ("n", "lines", "axes", "index", "row", "col", "row_step", "col_step")],
        *[(name, c_int64) for name in ("inner", "row_jump", "col_jump")],
        *[(name, c_int64) for name in ("first_row", "row_count", "first_col", "col_count")],
        *[(name, Axes) for name in ("size", "index_stride", "row_stride", "col_stride")],
    ]


class Sum(IntEnum):
    """The sums of one task: those of ``ppsf_dist.methods.sums.Stat`` from LARGEST_SQUARE on, in their order."""

    LARGEST_SQUARE = 0
    DOT = 1
    S_L1 = 2
    DELTA_L1 = 3
    DELTA_SQUARE = 4
    EARLY_MASK = 5
    UU = 6
    WW = 7
    WU = 8
    LATE_MASK = 9
    GG = 10


SUMS = len(Sum)
