"""What each rank would hold and reduce, computed from shapes alone: no rank is started and no memory is taken."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch

from ppsf_dist.algorithm.second_moment import Factoring, factoring
from ppsf_dist.algorithm.step_size import SLICE, statistics_dtype
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.reductions import Outcome
from ppsf_dist.scalars import VOID_NUMBERS
from ppsf_dist.sharding import flat_range
from ppsf_dist.sharding.geometry import Shape
from ppsf_dist.state.inventory import PARAMETER_NUMBERS

STRATEGIES = ("single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
ZERO_SUB_GROUP = 10**9
"""Elements of a rank that DeepSpeed steps at a time at stage 3, its default ``sub_group_size``."""
ZERO_ALIGNMENT = 2
"""DeepSpeed's partitions of stages 1 and 2 are a multiple of this many elements."""

_FP64, _FP32, _INT64, _BOOL = 8, 4, 8, 1


@dataclass(frozen=True)
class Share:
    """What one rank holds between two steps: elements of parameters, everything else in bytes.

    Attributes:
        elements: of parameters.
        weights, gradients: their bytes. Under ZeRO the weights of the model and the fp32 ones of this rank; of the
            gradients what is left of them after a backward pass.
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
            ``fully_shard`` cuts them), "hsdp" (the same over ``shards`` ranks, repeated), or "zero1" to "zero3" (cut at
            any element as DeepSpeed cuts them).
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
    listed: _Parameters = [(tuple(shape), dtype) for shape, dtype in parameters]
    # Layers repeat: each distinct parameter is looked at once.
    count = Counter(listed)
    whole = _whole(count, switches)
    divided = strategy not in ("single", "ddp") and world_size > 1
    if strategy.startswith("zero"):
        shares = _zero_shares(listed, switches, whole, int(strategy[-1]), world_size)
        sub_groups = _sub_groups(listed, world_size) if strategy == "zero3" else [count]
        reductions = tuple(size for part in sub_groups for size in _reductions(part, switches))
        return Forecast(strategy, tuple(shares), reductions if divided else ())
    pieces = {"fsdp": world_size, "hsdp": shards or 1}.get(strategy, 1)
    copies = 1 if strategy == "single" else world_size // pieces
    name = f"hsdp {copies}x{pieces}" if strategy == "hsdp" else strategy
    one_copy = [_share(_rows_of_all(count, rank, pieces), switches, whole) for rank in range(pieces)]
    return Forecast(name, tuple(one_copy * copies), _reductions(count, switches) if divided else ())


_Parameters = list[tuple[Shape, torch.dtype]]
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
    tables = (2 if switches.counts_mask_late else 1) * (slots * len(Stat) + len(Outcome))
    numbers = (
        _FP64 * (slots * len(PARAMETER_NUMBERS) + tables + (len(PRODIGY_PLUS.numbers) + len(VOID_NUMBERS)))
        + _FP32 * length
    )
    return Share(factored=_FP32 * length, numbers=numbers, indices=indices)


@dataclass(frozen=True)
class _Slice:
    """A range of a flattened parameter on one rank, and how many parameters have the same."""

    shape: Shape
    dtype: torch.dtype
    start: int
    numel: int
    count: int = 1


def _share(slices: Iterable[_Slice], switches: Switches, whole: Share) -> Share:
    """What a rank holds that steps these slices as they are, in their own dtype."""
    elements = weights = second_moments = samples = indices = 0
    for one in slices:
        size = one.count * one.numel * one.dtype.itemsize
        elements += one.count * one.numel
        weights += size
        axes = _factoring(one.shape, switches)
        if axes is None:
            second_moments += size
        else:
            boxes = flat_range(one.shape, one.start, one.numel)
            lines = sum(box.numel // box.size[axes.dr] + box.numel // box.size[axes.dc] for box in boxes)
            indices += one.count * _INT64 * lines
        if switches.statistics:
            kept = 1 if switches.speed else 2
            stored = statistics_dtype(one.dtype, quirks=switches.quirks).itemsize
            samples += one.count * kept * len(range(-one.start % SLICE, one.numel, SLICE)) * stored
    return Share(
        elements=elements,
        weights=weights,
        gradients=weights,
        averages=weights,
        second_moments=second_moments,
        samples=samples,
        factored=whole.factored,
        numbers=whole.numbers,
        indices=whole.indices + indices,
    )


def _rows_of_all(count: _Count, rank: int, pieces: int) -> Iterator[_Slice]:
    for (shape, dtype), n in count.items():
        yield _Slice(shape, dtype, *_rows_of(shape, rank, pieces), n)


def _rows_of(shape: Shape, rank: int, pieces: int) -> tuple[int, int]:
    """Where the rows of a rank begin in the flattened parameter, cut as ``torch.chunk`` cuts, and their elements."""
    if pieces == 1:
        return 0, math.prod(shape)
    if not shape:
        raise ValueError("a parameter without dimensions cannot be cut into rows: give it the shape (1,)")
    chunk, row = -(-shape[0] // pieces), math.prod(shape[1:])
    start = min(rank * chunk, shape[0])
    return start * row, (min(start + chunk, shape[0]) - start) * row


def _zero_shares(
    parameters: _Parameters, switches: Switches, whole: Share, stage: int, world_size: int
) -> Iterator[Share]:
    """What each rank holds under ZeRO, which steps fp32 weights beside those of the model."""
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in parameters)
    for slices in _slices_of_stage_3(parameters, world_size) if stage == 3 else _partitions(parameters, world_size):
        own = _share((replace(one, dtype=torch.float32) for one in slices), switches, whole)
        in_model = sum(one.count * one.numel * one.dtype.itemsize for one in slices)
        yield replace(
            own,
            weights=(in_model if stage == 3 else total) + own.weights,
            gradients=total if stage == 1 else in_model,
        )


def _partitions(parameters: _Parameters, world_size: int) -> Iterator[list[_Slice]]:
    """The slices of each rank where all parameters lie in one flat tensor that is cut into equal parts."""
    starts = list(accumulate((math.prod(shape) for shape, _ in parameters), initial=0))
    unit = ZERO_ALIGNMENT * world_size
    length = -(-starts[-1] // unit) * unit // world_size
    for rank in range(world_size):
        begin, end = rank * length, min((rank + 1) * length, starts[-1])
        slices = []
        for index in range(max(0, bisect_right(starts, begin) - 1), len(parameters)):
            first, last = max(begin, starts[index]), min(end, starts[index + 1])
            if starts[index] >= end:
                break
            if last > first:
                slices.append(_Slice(*parameters[index], first - starts[index], last - first))
        yield slices


def _slices_of_stage_3(parameters: _Parameters, world_size: int) -> Iterator[list[_Slice]]:
    """The slices of each rank where every parameter is cut into equal parts."""
    count = Counter(parameters)
    for rank in range(world_size):
        slices = []
        for (shape, dtype), n in count.items():
            numel = math.prod(shape)
            part = -(-numel // world_size)
            start = min(rank * part, numel)
            slices.append(_Slice(shape, dtype, start, min(part, numel - start), n))
        yield slices


def _sub_groups(parameters: _Parameters, world_size: int) -> list[_Count]:
    """The parameters that DeepSpeed steps together at stage 3: whole ones, until a rank has enough elements of them."""
    groups, elements = [Counter[tuple[Shape, torch.dtype]]()], 0
    for shape, dtype in parameters:
        if elements >= ZERO_SUB_GROUP:
            groups.append(Counter())
            elements = 0
        groups[-1][shape, dtype] += 1
        elements += -(-math.prod(shape) // world_size)
    return groups


def _reductions(count: _Count, switches: Switches) -> tuple[int, ...]:
    """Bytes of each all-reduce of a step: sums for factored moments (fp32) and the table of each parameter's (fp64)."""
    length = _buffer_length(count, switches)
    table = len(Stat) * count.total() + len(Outcome)
    if not length:
        reductions = [_FP64 * table]
    elif switches.adopt:
        reductions = [_FP64 * (table + length)]
    elif switches.needs_norms:
        reductions = [_FP32 * length, _FP64 * table]
    else:
        reductions = [_FP64 * (length + table)]
    return (*reductions, _FP64 * table) if switches.counts_mask_late else tuple(reductions)
