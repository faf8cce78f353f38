"""DeepSpeed without ZeRO on 16-bit parameters: the optimizer steps fp32 copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from ppsf_dist.sharding import Layout, Member, Part, Shard, find_shards


class CopiesLayout(Layout):
    """``param_groups`` hold fp32 copies of 16-bit parameters; their framework copies them back after each step.

    DeepSpeed does so at stage 0. It begins with a step on zero gradients.
    """

    starts_with_zeros = True

    def members(self, part: Part) -> list[Member]:
        param_ids = {id(param): n for n, param in enumerate(p for params in self.given for p in params)}
        originals = {id(copy): original for copy, original in self._pairs()}
        return [
            Member(copy, index, param_ids[id(originals[id(copy)])])
            for index, group in enumerate(self.groups)
            for copy in group["params"]
        ]

    def shards(self, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> list[Shard]:
        originals = dict(self._pairs())
        shards = find_shards([originals[param] for param in params], process_group)
        return [replace(shard, param=param) for shard, param in zip(shards, params, strict=True)]

    def refresh(self) -> None:
        for copy, original in self._pairs():
            original.data.copy_(copy)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [
            pair
            for group, params in zip(self.groups, self.given, strict=True)
            for pair in zip(group["params"], [p for p in params if p.requires_grad and p.numel()], strict=True)
        ]
