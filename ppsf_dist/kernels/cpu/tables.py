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
        *[(name, c_void_p) for name in ("begins", "values", "after", "inverse_n", "in_bf16", "adopt", "own_mean")],
        *[(name, c_void_p) for name in ("cell_of", "ordered", "lengths", "means")],
    ]


class GroupsTable(ctypes.Structure):
    """The numbers of all groups: rows by groups."""

    _fields_ = [
        *[
            (name, c_int64)
            for name in ("count", "arguments_count", "adaptive", "k", "skipped_steps", "coefficients_count", "options")
        ],
        *[(name, c_void_p) for name in ("values", "arguments", "known", "coefficients")],
    ]


class ParametersTable(ctypes.Structure):
    """The numbers of the parameters of a plan, and the sums that they follow from."""

    _fields_ = [
        *[(name, c_int64) for name in ("count", "columns", "sums_count")],
        *[
            (name, c_void_p)
            for name in ("traits", "group_of", "param_id", "numel", "numbers", "coefficients", "scales")
        ],
        *[(name, c_void_p) for name in ("keys", "moments_gate", "weights_gate", "stats", "sums", "outcome")],
    ]
