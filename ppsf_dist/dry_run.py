"""What each rank would hold and reduce, computed from shapes alone: no rank is started and no memory is taken."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch

from ppsf_dist.algorithm.second_moment import Factoring, factoring
from ppsf_dist.engine.group_numbers import OF_THE_STEP
from ppsf_dist.engine.reductions import Outcome
from ppsf_dist.methods.base import Method
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import flat_range
from ppsf_dist.sharding.geometry import Shape
from ppsf_dist.sharding.registry import entries, find
from ppsf_dist.state.inventory import PARAMETER_NUMBERS, Holds, Lies, needed

WHOLE = ("single", "ddp")
"""Strategies under which every rank has everything."""

_FP64, _FP32, _INT64, _BOOL = 8, 4, 8, 1

Described = tuple[Shape, torch.dtype]
"""A parameter: its shape and dtype."""


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
        indices: where rows and columns of factored parameters lie in their buffer. (Native kernels need none, but keep
            the samples of z packed: ``ppsf_dist.kernels.report`` says how much that is.)
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
        reductions: bytes that one rank gives to each all-reduce of a step of the optimizer, in order; from half a
            megabyte on sums of g^2 travel in up to four all-reduces beside pass 1 and are one here. What the
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


@dataclass(frozen=True)
class Slice:
    """A range of a flattened parameter on one rank, and how many parameters have the same."""

    shape: Shape
    dtype: torch.dtype
    start: int
    numel: int
    count: int = 1


class Model:
    """All parameters, in one group.

    Args:
        parameters: shape and dtype of each.
        switches: of the group.
        method: what the optimizer is.

    Attributes:
        count: how many there are of each distinct parameter. Layers repeat: each is looked at once.
    """

    def __init__(
        self, parameters: Iterable[tuple[Sequence[int], torch.dtype]], switches: Switches, method: Method
    ) -> None:
        self.parameters: list[Described] = [(tuple(shape), dtype) for shape, dtype in parameters]
        self.switches, self.method = switches, method
        self.count = Counter(self.parameters)

    def share(self, slices: Iterable[Slice]) -> Share:
        """What a rank holds that steps these slices as they are, in their own dtype."""
        switches, whole = self.switches, self._whole
        elements = weights = averages = second_moments = samples = indices = 0
        for one in slices:
            elements += one.count * one.numel
            weights += one.count * one.numel * one.dtype.itemsize
            sampled = len(range(-one.start % switches.slice_p, one.numel, switches.slice_p))
            for entry in needed(switches, one.shape):
                size = one.count * entry.dtype(one.dtype, switches).itemsize
                if entry.lies is Lies.SAMPLED:
                    samples += size * sampled
                elif entry.lies is Lies.LIKE_PARAMETER and entry.holds is Holds.SQUARES:
                    second_moments += size * one.numel
                elif entry.lies is Lies.LIKE_PARAMETER:
                    averages += size * one.numel
            axes = self._factoring(one.shape)
            if axes is not None:
                boxes = flat_range(one.shape, one.start, one.numel)
                lines = sum(box.numel // box.size[axes.dr] + box.numel // box.size[axes.dc] for box in boxes)
                indices += one.count * _INT64 * lines
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

    def reductions(self, count: Counter[Described] | None = None) -> tuple[int, ...]:
        """Bytes of each all-reduce of a step: sums for factored moments (fp32), the table of each parameter's (fp64).

        Args:
            count: the parameters that are stepped together, if not all are.
        """
        switches, count = self.switches, self.count if count is None else count
        length = self._buffer_length(count)
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

    @cached_property
    def _whole(self) -> Share:
        """What every rank holds, however parameters are cut."""
        switches, count = self.switches, self.count
        length, slots = self._buffer_length(count), count.total()
        # The flag of each mean that it is kept in 16 bits is there if one of them is.
        low = not switches.factored_fp32 and any(
            dtype == torch.bfloat16 and self._factoring(shape) is not None for shape, dtype in count
        )
        indices = length * (_INT64 + _FP32 + _BOOL * low)
        for (shape, _), n in count.items():
            axes = self._factoring(shape)
            if axes is not None:
                rows, _ = _means(axes)
                cell = axes.row_shape[axes.mean_axis(quirks=switches.quirks)]
                averaged = 0 if cell == 1 else _INT64 * (rows + rows // cell)
                indices += n * (rows * (_INT64 + _BOOL + _INT64) + averaged)
        tables = (2 if switches.counts_mask_late else 1) * (slots * len(Stat) + len(Outcome))
        of_group = len(self.method.numbers) + len(OF_THE_STEP)
        numbers = _FP64 * (slots * len(PARAMETER_NUMBERS) + tables + of_group) + _FP32 * length
        return Share(factored=_FP32 * length, numbers=numbers, indices=indices)

    def _factoring(self, shape: Shape) -> Factoring | None:
        return factoring(shape) if self.switches.second_moment and self.switches.factored else None

    def _buffer_length(self, count: Counter[Described]) -> int:
        factored = ((axes, n) for (shape, _), n in count.items() if (axes := self._factoring(shape)) is not None)
        return sum(n * sum(_means(axes)) for axes, n in factored)


class Foresee(Protocol):
    """What knows a strategy. One of your own is registered with ``ppsf_dist.sharding.register``."""

    def __call__(self, strategy: str, model: Model, world_size: int, shards: int | None) -> Forecast:
        """The forecast of a strategy, with the arguments of ``forecast``."""


def forecast(
    parameters: Iterable[tuple[Sequence[int], torch.dtype]],
    switches: Switches,
    strategy: str,
    world_size: int,
    shards: int | None = None,
    *,
    method: Method = PRODIGY_PLUS,
) -> Forecast:
    """What each rank would hold and reduce with all parameters in one group.

    Args:
        parameters: shape and dtype of each trainable parameter.
        switches: of the group.
        strategy: "single" (one rank, whatever ``world_size`` says), "ddp" (whole on every rank), "fsdp" (rows cut as
            ``fully_shard`` cuts them), "hsdp" (the same over ``shards`` ranks, repeated), "zero1" to "zero3" (cut at
            any element as DeepSpeed cuts them), or one that was registered.
        world_size: number of ranks.
        shards: ranks over which "hsdp" cuts.
        method: what the optimizer is, ``optimizer.method``.

    Raises:
        ValueError: the strategy is unknown, ``world_size`` is below 1 or no multiple of ``shards``, or a parameter
            without dimensions is to be cut.
    """
    foresee: Foresee | None = _foresee_whole if strategy in WHOLE else find("strategy", strategy)
    if foresee is None:
        allowed = ", ".join([*WHOLE, *(entry.name for entry in entries("strategy"))])
        raise ValueError(f"strategy={strategy!r} cannot be forecast: allowed are {allowed}")
    if world_size < 1:
        raise ValueError(f"world_size={world_size} is too small: 1 or more is allowed")
    return foresee(strategy, Model(parameters, switches, method), world_size, shards)


def _foresee_whole(strategy: str, model: Model, world_size: int, shards: int | None) -> Forecast:
    share = model.share(Slice(shape, dtype, 0, math.prod(shape), n) for (shape, dtype), n in model.count.items())
    return Forecast(strategy, (share,) * (1 if strategy == "single" else world_size), ())


def _means(axes: Factoring) -> tuple[int, int]:
    return math.prod(axes.row_shape), math.prod(axes.col_shape)
