"""Parameters under ZeRO: param_groups hold flat tensors, and step() comes once for each of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ppsf_dist.deepspeed.checkpoints import KEY, from_deepspeed, from_universal, is_universal, to_deepspeed
from ppsf_dist.deepspeed.refresh import refresh_model, show_late
from ppsf_dist.deepspeed.shards import Partition, ZeroShard, find_partition, is_trained
from ppsf_dist.methods.base import Method
from ppsf_dist.sharding import Group, Layout, Member, Part, Shard, State, plain_shard


class ZeroLayout(Layout):
    """ZeRO stages 1, 2 and 3, and BF16_Optimizer.

    Stages 1 and 2 call ``step()`` once for each group and let ``param_groups`` show only that one; stage 3 calls it
    once for each sub-group, with all other groups empty; BF16_Optimizer once. The flat tensors that a call shows say
    which part of the step it is.
    """

    def is_current(self) -> bool:
        return True

    def parameters(self) -> list[list[Tensor]]:
        return list(self.given)

    @cached_property
    def partition(self) -> Partition:
        """Looked up once: DeepSpeed's ``offload_states`` takes away what it is read off."""
        return find_partition(self.groups, self.given)

    @cached_property
    def _slices(self) -> dict[Tensor, ZeroShard]:
        return {shard.param: shard for shard in self.partition.slices.values()}

    @cached_property
    def all_parts(self) -> Part:
        return frozenset(self.partition.slices)

    @cached_property
    def _parts(self) -> dict[int, Part]:
        """The parameters that have slices in each flat tensor, by its ``id()``."""
        parts: dict[int, set[int]] = {}
        for param_id, shard in self.partition.slices.items():
            parts.setdefault(id(shard.flat), set()).add(param_id)
        return {flat: frozenset(param_ids) for flat, param_ids in parts.items()}

    def part(self, visible: Sequence[Group]) -> Part:
        flats = [id(flat) for group in visible for flat in group["params"]]
        return frozenset().union(*[self._parts[flat] for flat in flats if flat in self._parts])

    def signature(self, part: Part) -> Hashable:
        # The flat tensors stay as long as this layout.
        return part

    def members(self, part: Part) -> list[Member]:
        members, param_id = [], 0
        for index, params in enumerate(self.given):
            for param in params:
                if param_id in part:
                    members.append(Member(param, index, param_id))
                param_id += 1
        return members

    def refresh(self) -> None:
        trained = [[param for param in params if is_trained(param)] for params in self.given]
        refresh_model([(self._slices[params[0]].flat, params) for params in trained if params])

    def show(self, params: Sequence[Tensor]) -> None:
        show_late([self._slices[param] for param in params])

    def state_dict(self, method: Method, state: State) -> dict[str, Any]:
        return to_deepspeed(method, self.partition, state)

    def load_state_dict(self, method: Method, state_dict: dict[str, Any], state: State) -> bool:
        if KEY not in state_dict["param_groups"][0]:
            return False
        from_deepspeed(method, self.partition, state_dict, state)
        return True

    def take_over(self, method: Method, state: State) -> bool:
        if not is_universal(self.partition, state):
            return False
        from_universal(method, self.partition, state)
        return True

    def shards(self, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> list[Shard]:
        return [self._slices.get(param) or plain_shard(param) for param in params]
