"""What each rank would hold under ``fully_shard``, which cuts rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ppsf_dist.dry_run import Forecast, Model, Slice
from ppsf_dist.sharding.geometry import Shape, chunk


def forecast(strategy: str, model: Model, world_size: int, shards: int | None) -> Forecast:
    """What "fsdp" and "hsdp" cost; arguments as of ``ppsf_dist.dry_run.forecast``.

    Raises:
        ValueError: ``world_size`` is no multiple of ``shards`` for "hsdp", or a parameter without dimensions is cut.
    """
    pieces, name = world_size, strategy
    if strategy == "hsdp":
        if shards is None or shards < 1 or world_size % shards:
            raise ValueError(f"shards={shards} must divide world_size={world_size} for hsdp: give one of its divisors")
        pieces, name = shards, f"hsdp {world_size // shards}x{shards}"
    one_copy = [model.share(_slices(model, rank, pieces)) for rank in range(pieces)]
    return Forecast(name, tuple(one_copy * (world_size // pieces)), model.reductions() if world_size > 1 else ())


def _slices(model: Model, rank: int, pieces: int) -> Iterator[Slice]:
    for (shape, dtype), n in model.count.items():
        yield Slice(shape, dtype, *_rows_of(shape, rank, pieces), n)


def _rows_of(shape: Shape, rank: int, pieces: int) -> tuple[int, int]:
    """Where the rows of a rank begin in the flattened parameter, and their elements."""
    if pieces == 1:
        return 0, math.prod(shape)
    if not shape:
        raise ValueError("a parameter without dimensions cannot be cut into rows: give it the shape (1,)")
    start, rows = chunk(shape[0], pieces, rank)
    row = math.prod(shape[1:])
    return start * row, rows * row
