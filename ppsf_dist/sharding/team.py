"""The ranks that share one optimizer's sums, and the one place where a collective is called in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import AllreduceOptions


class CollectiveFailed(RuntimeError):
    """A collective has not come to its end: ranks are missing, or the network is."""


class Pending:
    """A sum over a team that goes on beside what this rank does. Nobody may touch the tensor before it has ended.

    Args:
        team: the ranks that sum.
        tensor: what is summed, in place.
        why: what it is, for the error's message.

    Attributes:
        has_arrived: whether the sums are there.
    """

    def __init__(self, team: Team, tensor: Tensor, why: str) -> None:
        self._team, self._tensor, self._why = team, tensor, why
        self._flat = tensor
        self._started: list[Any] = []
        self.has_arrived = False

    @property
    def has_started(self) -> bool:
        """Whether the other ranks count on this one."""
        return bool(self._started)

    def start(self) -> None:
        """Begin.

        Raises:
            CollectiveFailed: the network has failed.
        """
        try:
            self._flat = self._team.begin(self._started, self._tensor, waits=False)
        except RuntimeError as error:
            raise self._team.failed(self._why, error) from error

    def finish(self) -> None:
        """Wait for the sums. A ctrl-C waits for them too, because on the other ranks they arrive.

        Raises:
            CollectiveFailed: a rank has not come, or the network has failed.
        """
        to = () if self._flat is self._tensor else (self._tensor,)
        try:
            self._team.finish(self._started, self._flat, to)
        except RuntimeError as error:
            raise self._team.failed(self._why, error) from error
        except BaseException:
            self._team.finish(self._started, self._flat, to)
            self.has_arrived = True
            raise
        self.has_arrived = True


class Team:
    """Ranks whose shards together make up the parameters of one optimizer.

    Args:
        group: their process group, or None for a process alone: every reduction is then free.

    Attributes:
        arrived: whether the last ``sum_`` has its sums, which an exception such as a ctrl-C alone does not tell.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._device_types = _device_types(group)
        self.arrived = True
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(group)) if group is not None else ()

    @property
    def is_alone(self) -> bool:
        return len(self.ranks) <= 1

    @property
    def group_rank(self) -> int:
        """Of this process among ``ranks``."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def is_first(self) -> bool:
        return self.group_rank == 0

    def sum_(self, *tensors: Tensor, why: str = "sums of all ranks") -> None:
        """Sum tensors over the team, in place, in one all-reduce.

        Several tensors travel in one buffer of the widest dtype among them.

        Args:
            tensors: to be summed, each with those of the other ranks in its place.
            why: what they are, for the error's message.

        Raises:
            CollectiveFailed: a rank has not come, or the network has failed.
        """
        self.arrived = self.is_alone or not tensors
        if self.arrived:
            return
        device = self._device_for(tensors[0])
        if len(tensors) == 1 and tensors[0].device == device:
            self._all_reduce(tensors[0], (), why)
            return
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([t.reshape(-1).to(device=device, dtype=dtype) for t in tensors])
        self._all_reduce(flat, tensors, why)

    def fill_(self, tensor: Tensor) -> None:
        """Complete a tensor of which each rank has filled in a part of its own, with zeros elsewhere, in place.

        Every bit arrives as it was, in any dtype.

        Raises:
            CollectiveFailed: a rank has not come, or the network has failed.
        """
        if not self.is_alone and tensor.numel():
            parts = tensor.view(-1).view(torch.uint8)
            here = parts.to(self._device_for(tensor))
            self._all_reduce(here, (), "the parts of a tensor")
            parts.copy_(here)

    def _all_reduce(self, flat: Tensor, tensors: Sequence[Tensor], why: str) -> None:
        """Sum a flat tensor and copy its parts to where they belong.

        Where a ctrl-C comes in between, the sums arrive all the same, because on the other ranks they do.
        """
        started: list[Any] = []
        try:
            self.begin(started, flat, waits=True)
            self.finish(started, flat, tensors)
        except RuntimeError as error:
            raise self.failed(why, error) from error
        except BaseException:
            if started:
                self.finish(started, flat, tensors)
            raise

    def begin(self, started: list[Any], tensor: Tensor, *, waits: bool) -> Tensor:
        """Begin to sum a tensor, or a copy of it where the ranks can reduce; which one, is returned.

        Args:
            started: takes the work that has begun.
            tensor: to be summed.
            waits: whether nothing is done until it ends.
        """
        assert self.group is not None
        self.arrived = False
        here = tensor.to(self._device_for(tensor))
        options = AllreduceOptions()
        options.asyncOp = not waits
        # Both run in C: no signal is handled between the start of the sum and the knowledge that it has started.
        started.extend(map(self.group.allreduce, [[here]], [options]))
        return here

    def finish(self, started: Sequence[Any], flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Wait for a sum and copy its parts to where they belong."""
        for work in started:
            if work is not None:
                work.wait()
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
        self.arrived = True

    def _device_for(self, tensor: Tensor) -> torch.device:
        """Where the ranks can reduce a tensor: NCCL cannot in the memory of the host, where offloaded weights lie."""
        if tensor.device.type in self._device_types:
            return tensor.device
        return torch.device(self._device_types[0], torch.accelerator.current_device_index())

    def gather(self, value: object, *, why: str) -> list[object]:
        """Every rank's picklable value, in the order of ``ranks``. Waits for the host: not for use in a step.

        Raises:
            CollectiveFailed: a rank has not come, or the network has failed.
        """
        if self.is_alone:
            return [value]
        values: list[object] = [None] * len(self.ranks)
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise self.failed(why, error) from error
        return values

    def failed(self, why: str, error: RuntimeError) -> CollectiveFailed:
        """The error of a collective that has not come to its end."""
        return CollectiveFailed(
            f"rank {dist.get_rank()} waited for {why} with ranks {self.ranks}, and not all of them came: look at the "
            "first error of the others, and see whether each rank calls step(), eval(), train(), state_dict() and "
            f"load_state_dict() in the same order ({error})"
        )


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
