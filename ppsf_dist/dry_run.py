"""What each rank would hold and reduce, computed from shapes alone: no rank is started and no memory is taken."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from ppsf_dist.algorithm.second_moment import Factoring, factoring
from ppsf_dist.algorithm.step_size import SLICE, statistics_dtype
from ppsf_dist.kernels.interface import Stat
from ppsf_dist.options import Switches
from ppsf_dist.scalars import GROUP_NUMBERS, PARAMETER_NUMBERS
from ppsf_dist.sharding.geometry import Shape

STRATEGIES = ("single", "ddp", "fsdp", "hsdp")

_FP64, _FP32, _INT64, _BOOL = 8, 4, 8, 1


@dataclass(frozen=True)
class Share:
    """What one rank holds between two steps: elements of parameters, everything else in bytes.

    Attributes:
        elements: of parameters.
        weights, gradients: their bytes.
        averages: z of Schedule-Free, or momentum without it.
        second_moments: of parameters that are not factored.
        samples: p0 and s of Prodigy.
        factored: row and column means of factored second moments, whole on every rank.
        numbers: the tables of each parameter's and the group's numbers, and the buffers in which sums travel.
        indices: where rows and columns of factored parameters lie in their buffer.
    """

    elements: int = 0
    weights: int = 0
    gradients: int = 0
    averages: int = 0
    second_moments: int = 0
    samples: int = 0
    factored: int = 0
    numbers: int = 0
    indices: int = 0

    @property
    def state(self) -> int:
        """Bytes of everything that the optimizer keeps."""
        return self.averages + self.second_moments + self.samples + self.factored + self.numbers + self.indices

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and state."""
        return self.weights + self.gradients + self.state


@dataclass(frozen=True)
class Forecast:
    """A step under one strategy.

    Attributes:
        strategy: its name, with the mesh for HSDP.
        shares: of each rank.
        reductions: bytes that one rank gives to each all-reduce of a step of the optimizer, in order. What the
            strategy itself sends, gradients and gathered weights, comes on top.
    """

    strategy: str
    shares: tuple[Share, ...]
    reductions: tuple[int, ...]

    @property
    def total(self) -> Share:
        """The sum over all ranks."""
        count = Counter(self.shares)
        return Share(**{f.name: sum(n * getattr(share, f.name) for share, n in count.items()) for f in fields(Share)})


def forecast(
    parameters: Iterable[tuple[Sequence[int], torch.dtype]],
    switches: Switches,
    strategy: str,
    world_size: int,
    shards: int | None = None,
) -> Forecast:
    """What each rank would hold and reduce with all parameters in one group.

    Args:
        parameters: shape and dtype of each trainable parameter.
        switches: of the group.
        strategy: "single" (one rank, whatever ``world_size`` says), "ddp" (whole on every rank), "fsdp" (rows cut as
            ``fully_shard`` cuts them) or "hsdp" (the same over ``shards`` ranks, repeated).
        world_size: number of ranks.
        shards: ranks over which "hsdp" cuts.

    Raises:
        ValueError: the strategy is unknown, ``world_size`` is below 1 or no multiple of ``shards``, or a parameter
            without dimensions is to be cut.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} cannot be forecast: allowed are {', '.join(STRATEGIES)}")
    if world_size < 1:
        raise ValueError(f"world_size={world_size} is too small: 1 or more is allowed")
    if strategy == "hsdp" and (shards is None or shards < 1 or world_size % shards):
        raise ValueError(f"shards={shards} must divide world_size={world_size} for hsdp: give one of its divisors")
    pieces = {"fsdp": world_size, "hsdp": shards or 1}.get(strategy, 1)
    copies = 1 if strategy == "single" else world_size // pieces
    name = f"hsdp {copies}x{pieces}" if strategy == "hsdp" else strategy
    # Layers repeat: each distinct parameter is looked at once.
    count = Counter((tuple(shape), dtype) for shape, dtype in parameters)
    whole = _whole(count, switches)
    one_copy = [_share(count, switches, whole, rank, pieces) for rank in range(pieces)]
    divided = strategy in ("fsdp", "hsdp") and world_size > 1
    return Forecast(name, tuple(one_copy * copies), _reductions(count, switches) if divided else ())


_Count = Counter[tuple[Shape, torch.dtype]]


def _factoring(shape: Shape, switches: Switches) -> Factoring | None:
    return factoring(shape) if switches.factored else None


def _means(axes: Factoring) -> tuple[int, int]:
    return math.prod(axes.row_shape), math.prod(axes.col_shape)


def _buffer_length(count: _Count, switches: Switches) -> int:
    factored = ((axes, n) for (shape, _), n in count.items() if (axes := _factoring(shape, switches)) is not None)
    return sum(n * sum(_means(axes)) for axes, n in factored)


def _whole(count: _Count, switches: Switches) -> Share:
    """What every rank holds, however parameters are cut."""
    length, slots = _buffer_length(count, switches), count.total()
    # The flag of each mean that it is kept in 16 bits is there if one of them is.
    low = not switches.factored_fp32 and any(
        dtype == torch.bfloat16 and _factoring(shape, switches) is not None for shape, dtype in count
    )
    indices = length * (_INT64 + _FP32 + _BOOL * low)
    for (shape, _), n in count.items():
        axes = _factoring(shape, switches)
        if axes is not None:
            rows, _ = _means(axes)
            cell = axes.row_shape[axes.mean_axis(quirks=switches.quirks)]
            averaged = 0 if cell == 1 else _INT64 * (rows + rows // cell)
            indices += n * (rows * (_INT64 + _BOOL + _INT64) + averaged)
    columns = len(PARAMETER_NUMBERS) + len(Stat)
    numbers = _FP64 * (slots * columns + len(GROUP_NUMBERS)) + _FP32 * length
    return Share(factored=_FP32 * length, numbers=numbers, indices=indices)


def _share(count: _Count, switches: Switches, whole: Share, rank: int, pieces: int) -> Share:
    elements = weights = averages = second_moments = samples = indices = 0
    for (shape, dtype), n in count.items():
        local, first = _rows_of(shape, rank, pieces)
        numel, axes = math.prod(local), _factoring(shape, switches)
        elements += n * numel
        weights += n * numel * dtype.itemsize
        averages += n * numel * dtype.itemsize
        if axes is None:
            second_moments += n * numel * dtype.itemsize
        elif numel:
            indices += n * _INT64 * (numel // local[axes.dr] + numel // local[axes.dc])
        if switches.statistics:
            kept = 1 if switches.speed else 2
            stored = statistics_dtype(dtype, quirks=switches.quirks).itemsize
            samples += n * kept * len(range(-first % SLICE, numel, SLICE)) * stored
    return Share(
        elements=elements,
        weights=weights,
        gradients=weights,
        averages=averages,
        second_moments=second_moments,
        samples=samples,
        factored=whole.factored,
        numbers=whole.numbers,
        indices=whole.indices + indices,
    )


def _rows_of(shape: Shape, rank: int, pieces: int) -> tuple[Shape, int]:
    """The local shape on a rank, cut as ``torch.chunk`` cuts, and the place of its first element in the parameter."""
    if pieces == 1:
        return shape, 0
    if not shape:
        raise ValueError("a parameter without dimensions cannot be cut into rows: give it the shape (1,)")
    chunk = -(-shape[0] // pieces)
    start = min(rank * chunk, shape[0])
    stop = min(start + chunk, shape[0])
    return (stop - start, *shape[1:]), start * math.prod(shape[1:])


def _reductions(count: _Count, switches: Switches) -> tuple[int, ...]:
    """Bytes of each all-reduce of a step: sums for factored moments (fp32) and the table of each parameter's (fp64)."""
    length = _buffer_length(count, switches)
    table = len(Stat) * count.total()
    if not length:
        reductions = [_FP64 * table]
    elif switches.adopt:
        reductions = [_FP64 * (table + length)]
    elif switches.needs_norms:
        reductions = [_FP32 * length, _FP64 * table]
    else:
        reductions = [_FP64 * (length + table)]
    return (*reductions, _FP64 * table) if switches.counts_mask_late else tuple(reductions)
