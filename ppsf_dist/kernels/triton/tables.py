"""What Python and the device code share: the tables of a plan, and where everything stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ppsf_dist.kernels.codes import ADDRESSES, COEFFICIENTS, MOST_AXES, Flag, Piece

PIECE_FIELDS = len(bytes(Piece())) // 8
ADDRESS_COLUMNS = (*ADDRESSES, "aligned")
"""``aligned``: whether all that is laid out like the weights begins at a multiple of 16 bytes."""


class Task(NamedTuple):
    """What one program does: some lines of a piece, or a part of one line.

    Attributes:
        piece: its row in the table of pieces.
        first_line, last_line: from and to.
        begin, end: along each of them.
        sample: where its first sample stands among those of the shard.
        partial: where its sums along the lines wait.
        even: whether rows of 16 bytes divide it, if its memory begins at one.
    """

    piece: int
    first_line: int
    last_line: int
    begin: int
    end: int
    sample: int
    partial: int
    even: int


class On(NamedTuple):
    """Which formulas run: ``ppsf_dist.kernels.codes.Flag`` by flag, in its order."""

    owned: bool
    factored: bool
    schedulefree: bool
    momentum: bool
    second_moment: bool
    sgd_phase: bool
    statistics: bool
    speed: bool
    decays: bool
    decays_by_lr: bool
    coupled_decay: bool
    atan2: bool
    needs_norms: bool
    cautious: bool
    grams: bool
    stochastic: bool
    weights_in_bf16: bool
    samples_in_bf16: bool
    matrix: bool
    flat: bool

    @classmethod
    def of(cls, flags: int) -> On:
        return cls(**{str(flag.name).lower(): bool(flags & flag) for flag in Flag})


class Rows(NamedTuple):
    """Where each of ``ppsf_dist.kernels.codes.COEFFICIENTS`` stands in a method's table; -1 where it has none."""

    delta: int
    c: int
    q: int
    beta1: int
    weight_decay: int
    keep: int
    d: int
    d_eps: int
    momentum_weight: int
    beta2: int
    square_weight: int
    beta3: int
    s_weight: int
    root: int

    @classmethod
    def of(cls, names: Sequence[str]) -> Rows:
        return cls(**{name: names.index(name) if name in names else -1 for name in COEFFICIENTS})


class Numbers(NamedTuple):
    """Of a parameter, in a program: ``COEFFICIENTS`` and what passes read of ``ppsf_dist.kernels.interface.Scales``."""

    delta: Any
    c: Any
    q: Any
    beta1: Any
    weight_decay: Any
    keep: Any
    d: Any
    d_eps: Any
    momentum_weight: Any
    beta2: Any
    square_weight: Any
    beta3: Any
    s_weight: Any
    root: Any
    amount: Any
    mask: Any
    advance: Any


class Places(NamedTuple):
    """Where the first element of a task is in the weights and in what is laid out like them, in a program."""

    weights: Any
    gradient: Any
    z: Any
    exp_avg: Any
    exp_avg_sq: Any
    has_gradient: Any


class Fetched(NamedTuple):
    """A tile of gradient, y, z, momentum and second moment, in a program."""

    g: Any
    y: Any
    z: Any
    m: Any
    v: Any


class Factors(NamedTuple):
    """Where the factors of the second moment of a task are, in a program.

    Attributes:
        of_lines: of a matrix, the factor of each line.
        along: of a matrix, where those along the lines begin.
        row, col: where R and C of the parameter begin.
        of_row, of_col: what each line adds to that.
        begin: where the task begins along its lines.
        inner, row_jump, row_step, col_jump, col_step: of ``ppsf_dist.kernels.codes.Piece``.
    """

    of_lines: Any
    along: Any
    row: Any
    col: Any
    of_row: Any
    of_col: Any
    begin: Any
    inner: Any
    row_jump: Any
    row_step: Any
    col_jump: Any
    col_step: Any


class Kept(NamedTuple):
    """Where the first sample of a task is in what is kept of samples alone, in a program."""

    packed: Any
    p0: Any
    s: Any


class Samples(NamedTuple):
    """Samples of some lines of a task, in a program: as many of each as a tile may have.

    Attributes:
        slice_p: one element in so many is sampled.
        of_tile: of each line of a tile at least so many.
        number: the place of each among those of its line in the tile.
        column: of its line, that of the first sample.
        place: of its line, the first element's in the task.
        stand: how many samples of the task come before those of its line.
        end: where its line ends, 0 of one that is not there.
    """

    slice_p: Any
    of_tile: Any
    number: Any
    column: Any
    place: Any
    stand: Any
    end: Any


class SampleSums(NamedTuple):
    """Of what is sampled, in a program; ``l1`` is that of s, with SPEED of p0 - z, and ``square`` of that too."""

    dot: Any
    l1: Any
    square: Any


class Sizes(NamedTuple):
    """Lengths that kernels read instead of being compiled for them."""

    slots: int
    tasks: int
    stat_columns: int
    first_column: int


class Plan(NamedTuple):
    """Everything that a pass reads and writes, as tensors on the device.

    Attributes:
        pieces: int64, rows of ``ppsf_dist.kernels.codes.Piece``.
        tasks: int64, rows of ``Task``.
        addresses: int64, a row for each shard, by ``ADDRESS_COLUMNS``; renewed in every step.
        sizes: int64, ``Sizes``.
        coefficients, scales, factors, keys, sums: of ``ppsf_dist.kernels.interface.Buffers``.
        moments_gate, weights_gate: its gates as bytes.
        partial: fp32, sums along the lines of each task.
        results: fp64, sums of each task, one row for each sum.
        done: uint8, which tasks have been written in this step.
    """

    pieces: Any
    tasks: Any
    addresses: Any
    sizes: Any
    coefficients: Any
    scales: Any
    factors: Any
    keys: Any
    sums: Any
    moments_gate: Any
    weights_gate: Any
    partial: Any
    results: Any
    done: Any


def piece_field(name: str) -> int:
    """Where a field stands in a row of the table of pieces."""
    offset: int = getattr(Piece, name).offset
    return offset // 8


class Columns(NamedTuple):
    """Sums along the lines of a matrix: where they go, how many, where the first tile's wait, and how many tiles."""

    at: int
    n: int
    partial: int
    tiles: int


COLUMN_FIELDS = len(Columns._fields)
VECTOR_FIELDS = 4 + MOST_AXES
"""Of a vector of a parameter that is no matrix: where its sums go, the axis, boxes from and to, the shape."""
BOX_FIELDS = 3 + 2 * MOST_AXES
"""Of a box of it: the shard, whether it is in bf16, the place of its first element there, offset and size."""


class MomentsOnDevice(NamedTuple):
    """The tables of ``ppsf_dist.state.moments.FactoredMoments``, bools as bytes, and the moments that divide.

    ``kept`` are its values, by a name that Triton's own tuples do not have.
    """

    kept: Any
    of_factors: Any
    slot_of: Any
    inverse_n: Any
    in_bf16: Any
    rows: Any
    own_mean: Any
    cell_of: Any
    ordered: Any
