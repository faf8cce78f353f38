"""The ranks that share one optimizer's sums, and the one place where a collective is called in a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """Ranks whose shards together make up the parameters of one optimizer.

    Args:
        group: their process group, or None for a process alone: every reduction is then free.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._device_types = _device_types(group)
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(group)) if group is not None else ()

    @property
    def is_alone(self) -> bool:
        return len(self.ranks) <= 1

    @property
    def position(self) -> int:
        """Of this process among :attr:`ranks`."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def is_first(self) -> bool:
        return self.position == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Sum tensors over the team, in place, in one all-reduce.

        Several tensors travel in one buffer of the widest dtype among them.
        """
        if self.is_alone or not tensors:
            return
        device = self._device_for(tensors[0])
        if len(tensors) == 1 and tensors[0].device == device:
            dist.all_reduce(tensors[0], group=self.group)
            return
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([t.reshape(-1).to(device=device, dtype=dtype) for t in tensors])
        dist.all_reduce(flat, group=self.group)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()

    def fill_(self, tensor: Tensor) -> None:
        """Complete a tensor of which each rank has filled in a part of its own, with zeros elsewhere, in place.

        Every bit arrives as it was, in any dtype.
        """
        if not self.is_alone and tensor.numel():
            parts = tensor.view(-1).view(torch.uint8)
            here = parts.to(self._device_for(tensor))
            dist.all_reduce(here, group=self.group)
            parts.copy_(here)

    def _device_for(self, tensor: Tensor) -> torch.device:
        """Where the ranks can reduce a tensor: NCCL cannot in the memory of the host, where offloaded weights lie."""
        if tensor.device.type in self._device_types:
            return tensor.device
        return torch.device(self._device_types[0], torch.accelerator.current_device_index())

    def gather(self, value: object) -> list[object]:
        """Every rank's picklable value, in the order of :attr:`ranks`. Waits for the host: not for use in a step."""
        if self.is_alone:
            return [value]
        values: list[object] = [None] * len(self.ranks)
        dist.all_gather_object(values, value, group=self.group)
        return values


def _device_types(group: dist.ProcessGroup | None) -> list[str]:
    """Types of the devices on which a group can reduce."""
    if group is None:
        return []
    # As in "cpu:gloo,cuda:nccl".
    return [backend.split(":")[0] for backend in dist.get_backend_config(group).split(",")]


def everyone() -> Team:
    """All ranks of the job."""
    return Team(dist.group.WORLD if dist.is_initialized() else None)


def team_of_ranks(ranks: Sequence[int]) -> Team:
    """The team of the given global ranks. Collective over those ranks when no existing group fits."""
    if len(ranks) <= 1:
        return Team(None)
    if len(ranks) == dist.get_world_size():
        return Team(dist.group.WORLD)
    group = dist.new_group(sorted(ranks), use_local_synchronization=True)
    return Team(group)
