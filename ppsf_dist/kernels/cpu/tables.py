"""What Python and C++ share beside the codes. The mirror of ``plan.h``."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int64, c_void_p
from enum import IntEnum

from ppsf_dist.kernels.codes import COEFFICIENTS, Piece


class Pass(IntEnum):
    """What ``Library.run`` does with a task."""

    SUMS_OF_SQUARES = 1
    NORMS = 2
    WRITE = 3
    MASKS = 4


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
