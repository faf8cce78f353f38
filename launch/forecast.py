"""What train.py --dry-run prints."""

from __future__ import annotations

from options import Settings
from ppsf_dist.dry_run import Forecast, Share, forecast
from ppsf_dist.optimizers.base import DistributedOptimizer

COLUMNS = ("elements", "weights", "gradients", "state", "total")
UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
WIDTH = 20
NAME_WIDTH = 20


def table(settings: Settings, optimizer: DistributedOptimizer) -> str:
    """Returns what each rank of a run would hold and reduce, as lines of text.

    Args:
        settings: of the run, with a world size.
        optimizer: over the parameters of the model, which may be on the meta device.

    Raises:
        ValueError: there is no forecast for the strategy.
    """
    (group,) = optimizer.param_groups
    parameters = [(tuple(parameter.shape), parameter.dtype) for parameter in group["params"]]
    method = optimizer.method
    switches = method.switches_now(group)
    world_size = settings.world_size or 1
    names = [settings.strategy] if settings.strategy else ["single", "ddp", "fsdp", "deepspeed"]
    names = [f"zero{settings.zero_stage}" if name == "deepspeed" else name for name in names]
    forecasts = [forecast(parameters, switches, name, world_size, method=method) for name in names]
    if settings.shards:
        forecasts.append(forecast(parameters, switches, "hsdp", world_size, settings.shards, method=method))
    count = sum(shape.numel() for shape in (parameter.shape for parameter in group["params"]))
    lines = [f"{count:,} parameters in {len(parameters)} tensors, {settings.dtype}; {world_size} ranks"]
    for one in forecasts:
        lines += ["", *_lines(one)]
    lines += [
        "",
        "state: averages or momentum, second moments, samples for d, tables. Temporaries of a pass, activations,",
        "and what the strategy itself gathers, buffers and sends are not in these numbers.",
    ]
    return "\n".join(lines)


def _lines(one: Forecast) -> list[str]:
    shares = one.shares
    lines = [_row(one.strategy, COLUMNS)]
    if len(set(shares)) == 1:
        lines.append(_row("each rank" if len(shares) > 1 else "one rank", _cells(shares[0])))
    else:
        order = sorted(range(len(shares)), key=lambda rank: (shares[rank].total, -rank))
        lines.append(_row("rank 0", _cells(shares[0])))
        for name, rank in {"median": order[len(order) // 2], "emptiest": order[0], "last": len(shares) - 1}.items():
            lines.append(_row(f"{name} (rank {rank})", _cells(shares[rank])))
    if len(shares) > 1:
        lines.append(_row("all ranks", _cells(one.total)))
    sizes = ", ".join(_size(size) for size in one.reductions)
    lines.append(f"  reductions of a step: {len(one.reductions)}" + (f" ({sizes})" if sizes else ""))
    return lines


def _cells(share: Share) -> tuple[str, ...]:
    return f"{share.elements:,}", *(_size(getattr(share, name)) for name in COLUMNS[1:])


def _row(name: str, cells: tuple[str, ...]) -> str:
    return f"  {name:{NAME_WIDTH}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)


def _size(size: int) -> str:
    """A number of bytes with a unit."""
    return next((f"{size / unit:,.2f} {name}" for unit, name in UNITS if size >= unit), f"{size} B")
