"""Where ZeRO keeps the logical parameters: as slices of flat tensors, one tensor for many parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ppsf_dist.sharding import Shard, flat_range

Group = dict[str, Any]


@dataclass(eq=False, kw_only=True)
class ZeroShard(Shard):
    """A contiguous range of a logical parameter, a slice of a flat tensor. Padding lies outside every slice.

    Attributes:
        flat: the flat tensor of this rank, which DeepSpeed steps.
        at: where the slice begins in it.
        start: where it begins in the flattened logical parameter.
        group: the ranks that share the parameter.
    """

    flat: Tensor
    at: int
    start: int
    group: dist.ProcessGroup

    def weights(self) -> Tensor:
        return self.local(self.flat)

    def gradient(self) -> Tensor | None:
        return None if self.flat.grad is None else self.local(self.flat.grad)

    def local(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor that lies like the flat one."""
        return tensor.detach().narrow(0, self.at, self.numel)

    def extract(self, value: Tensor) -> Tensor:
        return value.reshape(-1).narrow(0, self.start, self.numel)

    def samples(self, slice_p: int) -> slice:
        """The sampled elements of the slice, relative to it."""
        return slice(-self.start % slice_p, self.numel, slice_p)

    def extract_samples(self, whole: Tensor, slice_p: int) -> Tensor:
        """This rank's part of the samples of the whole parameter."""
        first = -(-self.start // slice_p)
        return whole.narrow(0, first, len(range(self.numel)[self.samples(slice_p)]))


def is_trained(param: Tensor) -> bool:
    """Whether ZeRO partitions a parameter for the optimizer. Frozen and empty ones are left out."""
    return param.requires_grad and int(getattr(param, "ds_numel", param.numel())) > 0


@dataclass(frozen=True)
class Partition:
    """What ZeRO has made of an optimizer's parameters, as this rank sees it.

    Attributes:
        groups: all parameter groups as DeepSpeed has left them.
        given: the parameters that each group was made with.
        slices: of each trained parameter, empty ones included, by param_id, its number among all given parameters.
    """

    groups: list[Group]
    given: list[list[Tensor]]
    slices: dict[int, ZeroShard]

    def numbered_groups(self) -> list[Group]:
        """Copies of the groups with the param_ids of their parameters instead of tensors, as in a state dict."""
        numbered, first = [], 0
        for group, params in zip(self.groups, self.given, strict=True):
            numbered.append({**group, "params": list(range(first, first + len(params)))})
            first += len(params)
        return numbered


def find_partition(groups: list[Group], given: list[list[Tensor]]) -> Partition:
    """Read the slices off what ZeRO leaves on the parameters themselves.

    ``param._hp_mapping`` says the same, but is wrong under ``round_robin_gradients``.

    Raises:
        NotImplementedError: the parameters are not partitioned over all ranks.
    """
    slices, param_id = {}, 0
    for group, params in zip(groups, given, strict=True):
        for param in params:
            if is_trained(param):
                at_stage_3 = hasattr(param, "_z3_optimizer")
                slices[param_id] = (
                    _slice_of_stage_3(param) if at_stage_3 else _slice_of_stage_1_or_2(param, group["params"][0])
                )
            param_id += 1
    ranks: set[int] = set().union(*(shard.domain for shard in slices.values()))
    if len(ranks) != dist.get_world_size():
        raise NotImplementedError(
            f"DeepSpeed partitions the parameters over ranks {sorted(ranks)} of {dist.get_world_size()}: with tensor "
            "parallelism or pipeline stages the whole parameters cannot be told from their parts; partition them over "
            "all ranks (ZeRO alone), or use FSDP2 with tensor parallelism"
        )
    return Partition(groups, given, slices)


def _slice_of_stage_1_or_2(param: Any, flat: Tensor) -> ZeroShard:
    """The low-precision parameters of a group lie in one storage, which is cut into equal parts for the ranks."""
    first = dist.get_rank(param._dp_group) * flat.numel()
    begin = param.data.storage_offset()
    start, end = max(begin, first), min(begin + param.numel(), first + flat.numel())
    return _shard(param, param.shape, flat, start - first, start - begin, end - start, param._dp_group)


def _slice_of_stage_3(param: Any) -> ZeroShard:
    """Each parameter is cut into equal parts for the ranks; the last parts are padded with what memory held."""
    optimizer = param._z3_optimizer
    sub_group, at, padded = optimizer.grad_position[param.ds_id]
    start = dist.get_rank(param.ds_process_group) * padded
    numel = min(padded, param.ds_numel - start)
    flat = optimizer.fp32_partitioned_groups_flat[sub_group]
    return _shard(param, param.ds_shape, flat, at, start, numel, param.ds_process_group)


def _shard(
    param: Tensor, shape: Sequence[int], flat: Tensor, at: int, start: int, numel: int, ranks: dist.ProcessGroup
) -> ZeroShard:
    shape = tuple(shape)
    if numel <= 0:
        at = start = numel = 0
    boxes = tuple(flat_range(shape, min(start, math.prod(shape)), numel))
    domain = tuple(dist.get_process_group_ranks(ranks))
    return ZeroShard(param, shape, boxes, domain=domain, flat=flat, at=at, start=start, group=ranks)
