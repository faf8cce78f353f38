"""BatchNorm at the averaged weights: its running statistics were taken at the training weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ppsf_dist.refusals import refuse_process_group
from ppsf_dist.sharding import Team, find_shards, find_team, from_every_rank, together

_END = object()
_recalibrated: WeakSet[nn.Module] = WeakSet()


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> int:
    """Take the running mean and variance of every BatchNorm anew, from some batches at the weights as they are now.

    Schedule-Free trains at y and evaluates at x, at which activations have other statistics: call this with the average
    in place, before you evaluate or save::

        with ppsf_dist.averaged(optimizer, model):
            ppsf_dist.recalibrate_batch_norm(model, itertools.islice(loader, 50))
            evaluate(model)

    Statistics are means over the batches of all ranks, the same on every rank. All modules but BatchNorm are in
    evaluation mode meanwhile (no dropout), and no gradient is computed. Modes and momenta are restored afterwards.

    Args:
        model: the model as it is called: under DDP the ``DistributedDataParallel`` itself, for its ranks. All its
            BatchNorm layers with running statistics are meant, ``SyncBatchNorm`` too.
        batches: of the training data, on the device of the model; of a tuple or list the first element is given to the
            model, a mapping by keyword, anything else as it is. Ranks may have different numbers of them unless
            parameters are sharded or a layer is a ``SyncBatchNorm``: those wait for each other in each batch.
        forward: what to call with each batch in place of the model.
        process_group: ranks whose batches count. Default: those of DDP, or all that the parameters are sharded over.

    Returns:
        How many layers have new statistics. Without one no batch is asked for.

    Raises:
        ValueError: no rank has a batch, or ranks that wait for each other have different numbers of them.
        Exception: of the model or of the batches, on every rank. Statistics are as they were then.
    """
    refuse_process_group(process_group)
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    shards = find_shards(list(model.parameters()), process_group)
    if process_group is None and isinstance(model, DistributedDataParallel):
        team = Team(model.process_group)
    else:
        team = find_team(shards, process_group)
    synchronized = [isinstance(layer, nn.SyncBatchNorm) for layer in layers]
    wait = any(synchronized) or any(shard.numel < math.prod(shard.shape) for shard in shards)
    # That of DDP would give every rank the statistics of the first one before each batch.
    module = model.module if isinstance(model, DistributedDataParallel) else model
    call = forward or (lambda batch: _call(module, batch))
    with _measuring(model, layers):
        if wait:
            count = _in_step(team, batches, call)
        else:
            count = together(team, lambda: _alone(batches, call))
        _combine(team, layers, synchronized, count)
    _recalibrated.update(layers)
    return len(layers)


def not_recalibrated(model: nn.Module) -> list[str]:
    """The names of the BatchNorm layers whose running statistics ``recalibrate_batch_norm`` has never taken."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None)
    return [name for name, module in found if module not in _recalibrated]


def _call(module: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _alone(batches: Iterable[Any], call: Callable[[Any], object]) -> int:
    """The number of batches, all of which have been called."""
    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        call(batch)
    return count


def _in_step(team: Team, batches: Iterable[Any], call: Callable[[Any], object]) -> int:
    """The number of batches, each of which all ranks begin together.

    Raises:
        ValueError: some ranks have another batch and some do not.
    """
    iterator = iter(batches)
    for count in itertools.count():
        batch: list[Any] = []

        def fetch(into: list[Any] = batch) -> bool:
            into.append(next(iterator, _END))
            return into[0] is not _END

        have = from_every_rank(team, fetch)
        if not any(have):
            return count
        if not all(have):
            without = [rank for rank, has in zip(team.ranks, have, strict=True) if not has]
            raise ValueError(
                f"ranks {without} have {count} batches, others more, and in the model they wait for each other: give "
                "each rank as many (a DataLoader with drop_last=True, or itertools.islice)"
            )
        call(batch[0])
    raise AssertionError("itertools.count() never ends")


def _combine(team: Team, layers: list[_BatchNorm], synchronized: list[bool], count: int) -> None:
    """Give each rank the mean over the batches of all. What a SyncBatchNorm has is of all ranks already."""
    total = torch.tensor(float(count), dtype=torch.float64)
    own = [layer for layer, is_synchronized in zip(layers, synchronized, strict=True) if not is_synchronized]
    statistics = [s for layer in own for s in (layer.running_mean, layer.running_var) if s is not None]
    sums = [statistic.double() * count for statistic in statistics]
    team.sum_(total, *sums, why="the statistics of BatchNorm")
    batches = int(total)
    if not batches:
        raise ValueError("batches is empty on every rank: give some batches of the training data")
    for statistic, value in zip(statistics, sums, strict=True):
        statistic.copy_(value / batches)
    for layer in own:
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)


@contextmanager
def _measuring(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let the layers average over all that they see; on an exception they have what they had."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
            # None is the plain mean.
            layer.momentum = None
        yield
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in buffers.items():
                layer.get_buffer(name).copy_(buffer)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
