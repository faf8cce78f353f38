"""What each rank would hold under ZeRO: how DeepSpeed cuts parameters, without DeepSpeed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from ppsf_dist.dry_run import Described, Forecast, Model, Share, Slice

ZERO_SUB_GROUP = 10**9
"""Elements of a rank that DeepSpeed steps at a time at stage 3, its default ``sub_group_size``."""
ZERO_ALIGNMENT = 2
"""DeepSpeed's partitions of stages 1 and 2 are a multiple of this many elements."""


def forecast(strategy: str, model: Model, world_size: int, shards: int | None) -> Forecast:
    """What "zero1" to "zero3" cost; arguments as of ``ppsf_dist.dry_run.forecast``."""
    stage = int(strategy[-1])
    sub_groups = _sub_groups(model.parameters, world_size) if stage == 3 else [model.count]
    reductions = tuple(size for part in sub_groups for size in model.reductions(part))
    return Forecast(strategy, tuple(_shares(model, stage, world_size)), reductions if world_size > 1 else ())


def _shares(model: Model, stage: int, world_size: int) -> Iterator[Share]:
    """What each rank holds; ZeRO steps fp32 weights beside those of the model."""
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in model.parameters)
    cut = _slices_of_stage_3 if stage == 3 else _partitions
    for slices in cut(model.parameters, world_size):
        own = model.share(replace(one, dtype=torch.float32) for one in slices)
        in_model = sum(one.count * one.numel * one.dtype.itemsize for one in slices)
        yield replace(
            own,
            weights=(in_model if stage == 3 else total) + own.weights,
            gradients=total if stage == 1 else in_model,
        )


def _partitions(parameters: Sequence[Described], world_size: int) -> Iterator[list[Slice]]:
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
                slices.append(Slice(*parameters[index], first - starts[index], last - first))
        yield slices


def _slices_of_stage_3(parameters: Sequence[Described], world_size: int) -> Iterator[list[Slice]]:
    """The slices of each rank where every parameter is cut into equal parts."""
    count = Counter(parameters)
    for rank in range(world_size):
        slices = []
        for (shape, dtype), n in count.items():
            numel = math.prod(shape)
            part = -(-numel // world_size)
            start = min(rank * part, numel)
            slices.append(Slice(shape, dtype, start, min(part, numel - start), n))
        yield slices


def _sub_groups(parameters: Sequence[Described], world_size: int) -> list[Counter[Described]]:
    """The parameters that DeepSpeed steps together at stage 3: whole ones, until a rank has enough elements of them."""
    groups, elements = [Counter[Described]()], 0
    for shape, dtype in parameters:
        if elements >= ZERO_SUB_GROUP:
            groups.append(Counter())
            elements = 0
        groups[-1][shape, dtype] += 1
        elements += -(-math.prod(shape) // world_size)
    return groups
