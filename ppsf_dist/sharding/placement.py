"""How a list of parameters lies on the ranks, for what is not a step of an optimizer here."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.sharding.finding import find_shards, find_team

LISTS_KEPT = 8
"""For how many lists of parameters it is remembered how they lie on the ranks."""


class Placement:
    """How some parameters lie on the ranks, found once. Keeps no parameter alive.

    Attributes:
        team: the ranks that share sums over the parameters.
        shards: what this rank holds of each, without the parameter itself.
        owners: whether this rank counts its elements of each in such sums.
    """

    def __init__(self, parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> None:
        shards = find_shards(parameters, process_group)
        self.team = find_team(shards, process_group)
        self.owners = [shard.owner for shard in shards]
        nothing = torch.empty(0)
        self.shards = [replace(shard, param=nothing) for shard in shards]
        self._world = _world()
        self._parameters = [weakref.ref(parameter) for parameter in parameters]

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters and processes that this was made for."""
        pairs = zip(self._parameters, parameters, strict=True)
        return self._world is _world() and all(known() is parameter for known, parameter in pairs)

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The local part of each gradient."""
        return [
            None if parameter.grad is None else shard.local(parameter.grad)
            for shard, parameter in zip(self.shards, parameters, strict=True)
        ]


_prepared: OrderedDict[object, Placement] = OrderedDict()


def placement_of(parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> Placement:
    """The placement of some parameters: found at the first of many calls with the same ones.

    Raises:
        NotImplementedError, ValueError: as ``ppsf_dist.sharding.finding.find_shards``.
    """
    key = (process_group, *map(id, parameters))
    known = _prepared.get(key)
    if known is None or not known.fits(parameters):
        known = _prepared[key] = Placement(parameters, process_group)
    _prepared.move_to_end(key)
    if len(_prepared) > LISTS_KEPT:
        _prepared.popitem(last=False)
    return known


def _world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None
