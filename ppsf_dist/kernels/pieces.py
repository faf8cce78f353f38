"""How a shard is told to the kernels: which of it they can do, and where its elements, rows and columns lie."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppsf_dist.kernels.codes import MOST_AXES, Axes, Flag, Piece
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Box, Shard
from ppsf_dist.sharding.geometry import row_major_strides
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.samples import count_in

FLOATS = (torch.float32, torch.bfloat16)
SAMPLES = ("p0", "s")
LIKE_WEIGHTS = ("z", "exp_avg", "exp_avg_sq")

_EAGER_ONLY = ("focus", "orthograd", "adopt")


def why_not(shard: Shard, switches: Switches, state: Mapping[str, Any]) -> str | None:
    """Why C++ and Triton leave a shard to the eager kernels; None if they do not."""
    for name in _EAGER_ONLY:
        if getattr(switches, name):
            return f"use_{name}"
    weights = shard.weights()
    if type(weights.data) is not Tensor:
        return f"tensors of class {type(weights.data).__name__}"
    if weights.dtype not in FLOATS:
        return f"weights in {str(weights.dtype).removeprefix('torch.')}"
    if any(len(box.shape) > MOST_AXES for box in shard.boxes):
        return f"more than {MOST_AXES} axes"
    for name, value in state.items():
        if name not in (*LIKE_WEIGHTS, *SAMPLES):
            continue
        if value.dtype != weights.dtype and name in LIKE_WEIGHTS or value.dtype not in FLOATS:
            return f"{name} in {str(value.dtype).removeprefix('torch.')}"
        if not value.is_contiguous():
            return f"strides of {name}"
    if len({state[name].dtype for name in SAMPLES if name in state}) > 1:
        return "p0 and s of different dtypes"
    return None if weights.is_contiguous() else "strides of the weights"


def flags_of(shard: Shard, switches: Switches, state: Mapping[str, Any], *, factored: bool) -> Flag:
    """The formulas that run on a shard."""
    asked = {
        Flag.OWNED: shard.owner,
        Flag.FACTORED: factored,
        Flag.SCHEDULEFREE: switches.schedulefree,
        Flag.MOMENTUM: switches.momentum,
        Flag.SECOND_MOMENT: switches.second_moment,
        Flag.SGD_PHASE: switches.sgd_phase,
        Flag.STATISTICS: switches.statistics,
        Flag.SPEED: switches.speed,
        Flag.DECAYS: switches.weight_decay,
        Flag.DECAYS_BY_LR: switches.weight_decay_by_lr,
        Flag.COUPLED_DECAY: switches.coupled_decay,
        Flag.ATAN2: switches.atan2,
        Flag.NEEDS_NORMS: switches.needs_norms,
        Flag.CAUTIOUS: switches.cautious,
        Flag.GRAMS: switches.grams and not switches.cautious,
        Flag.STOCHASTIC: switches.stochastic_rounding,
        Flag.WEIGHTS_IN_BF16: shard.weights().dtype == torch.bfloat16,
        Flag.SAMPLES_IN_BF16: any(state[name].dtype == torch.bfloat16 for name in SAMPLES if name in state),
    }
    flags = Flag(0)
    for flag, on in asked.items():
        flags |= flag if on else Flag(0)
    return flags


class _Axis(NamedTuple):
    """An axis of a box: how many elements, and the step from one to the next in the parameter, in R and in C."""

    size: int
    flat: int
    row: int
    col: int

    def continues(self, inner: _Axis) -> bool:
        """Whether both are one longer axis: memory is contiguous anyway."""
        return self[1:] == (inner.size * inner.flat, inner.size * inner.row, inner.size * inner.col)


_NOTHING = _Axis(1, 1, 0, 0)


class Place(NamedTuple):
    """Where a box lies.

    Attributes:
        shard: its row in the table of addresses.
        slot: of its parameter.
        ordinal: which of the boxes of its shard it is.
        element, sample: how many elements and samples of its shard come before it.
    """

    shard: int
    slot: int
    ordinal: int
    element: int
    sample: int


def all_pieces(
    shards: Sequence[Shard],
    slots: Sequence[int],
    switches: Sequence[Switches],
    moments: FactoredMoments,
    state: Mapping[Tensor, Mapping[str, Any]],
) -> list[Piece]:
    """What the shards of a plan hold, sorted by rounds. Arguments as of a backend's ``prepare``."""
    pieces: list[Piece] = []
    for row, (shard, slot, switch) in enumerate(zip(shards, slots, switches, strict=True)):
        flags = flags_of(shard, switch, state[shard.param], factored=moments.placed[slot] is not None)
        element = sample = 0
        for ordinal, box in enumerate(shard.boxes):
            if box.numel:
                place = Place(row, slot, ordinal, element, sample)
                pieces += pieces_of(box, place, flags, switch.slice_p, moments)
            element, sample = element + box.numel, sample + count_in(box, switch.slice_p)
    return sorted(pieces, key=lambda piece: (piece.round, piece.slot))


def pieces_of(box: Box, place: Place, flags: Flag, slice_p: int, moments: FactoredMoments) -> Iterator[Piece]:
    """A box as lines: one piece, or one for each of a stack of matrices.

    Args:
        box: not empty.
        place: where it lies.
        flags: which formulas run on it.
        slice_p: distance of samples.
        moments: know the places of its rows and columns.
    """
    stacked = moments.placed[place.slot] is not None and len(box.size) > 2
    axis = next((axis for axis, n in enumerate(box.size) if n > 1), None)
    if not stacked or axis is None or 0 in _steps(box, place.slot, moments)[axis][2:]:
        yield _piece_of(box, place, flags, slice_p, moments)
        return
    zeros = (0,) * len(box.size)
    for at in range(box.size[axis]):
        start, size = list(zeros), list(box.size)
        start[axis], size[axis] = at, 1
        one = box.narrow(tuple(start), tuple(size))
        yield from pieces_of(one, place, flags, slice_p, moments)
        place = place._replace(element=place.element + one.numel, sample=place.sample + count_in(one, slice_p))


def _steps(box: Box, slot: int, moments: FactoredMoments) -> list[_Axis]:
    """The axes of a box. Along those that R or C average over there is no step."""
    strides = row_major_strides(box.shape)
    if moments.placed[slot] is None:
        return [_Axis(size, step, 0, 0) for size, step in zip(box.size, strides, strict=True)]
    row, col = moments.strided(slot, box)
    return [
        _Axis(size, step, row.stride[axis] * (row.size[axis] > 1), col.stride[axis] * (col.size[axis] > 1))
        for axis, (size, step) in enumerate(zip(box.size, strides, strict=True))
    ]


def _piece_of(box: Box, place: Place, flags: Flag, slice_p: int, moments: FactoredMoments) -> Piece:
    axes: list[_Axis] = []
    for axis in _steps(box, place.slot, moments):
        if axis.size > 1 and axes and axes[-1].continues(axis):
            axes[-1] = axis._replace(size=axis.size * axes[-1].size)
        elif axis.size > 1:
            axes.append(axis)
    if not axes or axes[-1].flat != 1 or not {axes[-1].row, axes[-1].col} <= {0, 1}:
        axes.append(_NOTHING)
    *outer, line = axes
    parts = _Axis(1, line.size, 0, 0)
    if _is_matrix(outer, line):
        flags |= Flag.MATRIX
    elif outer and line.flat == 1 and outer[-1].flat == line.size and line.row + line.col > 0:
        # Short lines, such as the kernels of a convolution: those along one more axis are parts of a longer one.
        parts = outer.pop()
    if box.is_flat:
        flags |= Flag.FLAT

    def padded(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
        return Axes(*values, *[0] * (MOST_AXES - len(values)))

    piece = Piece(
        slot=place.slot, flags=int(flags), slice_p=slice_p, shard=place.shard, round=place.ordinal, first=place.element,
        first_sample=place.sample, n=line.size * parts.size, lines=math.prod(axis.size for axis in outer),
        axes=len(outer), index=box.flat_start, row_step=line.row, col_step=line.col,
        inner=line.size, row_jump=parts.row, col_jump=parts.col, size=padded([axis.size for axis in outer]),
        index_stride=padded([axis.flat for axis in outer]), row_stride=padded([axis.row for axis in outer]),
        col_stride=padded([axis.col for axis in outer]),
    )  # fmt: skip
    placed = moments.placed[place.slot]
    if placed is not None:
        row, col = moments.strided(place.slot, box)
        piece.row, piece.col = row.start, col.start
        piece.first_row, piece.row_count = placed.row.start, placed.row.stop - placed.row.start
        piece.first_col, piece.col_count = placed.col.start, placed.col.stop - placed.col.start
    return piece


def _is_matrix(outer: list[_Axis], line: _Axis) -> bool:
    """Whether of R and C one has a value for each line, and the other one for each element of every line."""
    if len(outer) > 1 or {line.row, line.col} != {0, 1}:
        return False
    along, across = ("row", "col") if line.row else ("col", "row")
    return all(getattr(axis, along) == 0 and getattr(axis, across) != 0 for axis in outer)
