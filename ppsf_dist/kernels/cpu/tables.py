"""What Python and C++ share. The mirror of ``plan.h``; the library is asked for its sizes when it is loaded."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int64, c_void_p
from enum import IntEnum, IntFlag

MOST_AXES = 7

ADDRESSES = ("weights", "gradient", "z", "exp_avg", "exp_avg_sq", "p0", "s", "packed z")
"""What lies where: the columns of the table of addresses."""

COEFFICIENTS = (
    "delta", "c", "q", "beta1", "weight_decay", "keep", "d", "d_eps", "momentum_weight", "beta2", "square_weight",
    "beta3", "s_weight", "root",
)  # fmt: skip
"""The coefficients that the formulas know, by the names that methods give them."""


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
    P0_IN_BF16 = 1 << 17
    S_IN_BF16 = 1 << 18
    MATRIX = 1 << 19
    FLAT = 1 << 20


class Pass(IntEnum):
    """What :attr:`Library.run` does with a task."""

    SUMS_OF_SQUARES = 1
    NORMS = 2
    WRITE = 3
    MASKS = 4


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


class Task(ctypes.Structure):
    """What one thread does at once."""

    _fields_ = [
        (name, c_int64) for name in ("piece", "first_line", "last_line", "begin", "end", "sample", "batch", "partial")
    ]


class Job(ctypes.Structure):
    """Which tasks are taken."""

    _fields_ = [("next", c_int64), ("last", c_int64)]
    next: int
    last: int


class PlanTable(ctypes.Structure):
    """Everything that a pass reads."""

    _fields_ = [
        ("pieces", POINTER(Piece)),
        ("tasks", POINTER(Task)),
        ("addresses", c_void_p),
        ("coefficients", c_void_p),
        ("slots", c_int64),
        ("rows", c_int64 * len(COEFFICIENTS)),
        *[(name, c_void_p) for name in ("factors", "scales", "keys", "moments_gate", "weights_gate", "sums", "stats")],
        ("stat_columns", c_int64),
        *[(name, c_void_p) for name in ("masks", "partial", "results")],
    ]


class MomentsTable(ctypes.Structure):
    """The flat buffer of factored moments."""

    _fields_ = [
        ("count", c_int64),
        *[(name, c_void_p) for name in ("values", "after", "slot_of", "inverse_n", "in_bf16", "adopt")],
        ("rows", c_int64),
        *[(name, c_void_p) for name in ("row", "own_mean", "cell_of")],
        ("cells", c_int64),
        *[(name, c_void_p) for name in ("ordered", "lengths", "means")],
    ]


class Range(ctypes.Structure):
    """The part of it that belongs to some parameters, from and to."""

    _fields_ = [*[(name, c_int64 * 2) for name in ("value", "row", "cell")], ("ordered", c_int64)]


SUMS = 11
"""How many sums a task makes: those of :class:`ppsf_dist.methods.sums.Stat` from LARGEST_SQUARE on."""
