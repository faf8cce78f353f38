"""How an optimizer's parameters stand in ``param_groups``: the base class of all layouts, and the plain one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ppsf_dist.methods.base import Method
from ppsf_dist.sharding.finding import find_shards
from ppsf_dist.sharding.registry import find
from ppsf_dist.sharding.shard import Shard

Group = dict[str, Any]
Part = frozenset[int]
State = dict[Tensor, dict[str, Any]]


class Member(NamedTuple):
    """A trainable parameter, the index of its group, and its number among all parameters of the optimizer."""

    param: Tensor
    group: int
    param_id: int


class Layout:
    """How an optimizer's parameters stand in ``param_groups``. In this class they are there themselves, all of them.

    A framework that puts tensors of its own in their place has a subclass. It may step them in several parts, each with
    a call of ``step()`` that shows only what belongs to it; all calls together are one step. Here a part is the
    param_ids of its parameters, and an empty one means all of them.

    Args:
        groups: all parameter groups.
        given: the list of parameters that each group was made with.
    """

    starts_with_zeros = False
    """Whether the framework begins with a step on zero gradients, only to create state."""

    def __init__(self, groups: list[Group], given: list[list[Tensor]]) -> None:
        self.groups, self.given = groups, given
        self._lists = [group["params"] for group in groups]

    def is_current(self) -> bool:
        """Whether the parameters still stand in ``param_groups`` as they did when this object was made."""
        return len(self._lists) == len(self.groups) and all(
            group["params"] is params for group, params in zip(self.groups, self._lists, strict=True)
        )

    def parameters(self) -> list[list[Tensor]]:
        """The parameters of each group, frozen ones included."""
        return [group["params"] for group in self.groups]

    @property
    def all_parts(self) -> Part:
        """All parts of a step."""
        return frozenset()

    def part(self, visible: Sequence[Group]) -> Part:
        """What a call of ``step()`` is about that finds these groups in ``param_groups``."""
        return frozenset()

    def signature(self, part: Part) -> Hashable:
        """What the plan for a part depends on."""
        if part:
            members = self.members(part)
            params, counts = [member.param for member in members], tuple([member.group for member in members])
        else:
            trained = [[param for param in params if param.requires_grad] for params in self.parameters()]
            params, counts = list(chain.from_iterable(trained)), tuple(map(len, trained))
        # Asked for in every step: no call and no tuple for each of them.
        return counts, tuple(map(id, params)), tuple([p.device for p in params]), tuple([p.dtype for p in params])

    def members(self, part: Part) -> list[Member]:
        """The trainable parameters of a part, in order."""
        if part:
            some = [
                Member(self.groups[group]["params"][i], group, n) for n in sorted(part) for group, i in [self._at[n]]
            ]
            return [member for member in some if member.param.requires_grad]
        members, param_id = [], 0
        for index, params in enumerate(self.parameters()):
            for param in params:
                if param.requires_grad:
                    members.append(Member(param, index, param_id))
                param_id += 1
        return members

    @cached_property
    def _at(self) -> list[tuple[int, int]]:
        """Where each parameter stands: its group, and its index there."""
        return [(group, index) for group, params in enumerate(self._lists) for index in range(len(params))]

    @cached_property
    def param_ids(self) -> dict[Tensor, int]:
        """The number of each parameter among all parameters."""
        return {param: n for n, param in enumerate(param for params in self._lists for param in params)}

    def shards(self, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> list[Shard]:
        """The local shard of each parameter, in order."""
        return find_shards(params, process_group)

    def refresh(self) -> None:
        """Let the model see that ``train()`` or ``eval()`` has changed the weights. Collective."""

    def show(self, params: Sequence[Tensor]) -> None:
        """Let the framework see weights that were written after the call of ``step()`` that was about them."""

    def state_dict(self, method: Method, state: State) -> dict[str, Any] | None:
        """The state in the form that the framework's checkpoints need, or None if any form will do."""
        return None

    def load_state_dict(self, method: Method, state_dict: dict[str, Any], state: State) -> bool:
        """Load what ``state_dict`` made; False if it is something else."""
        return False

    def take_over(self, method: Method, state: State) -> bool:
        """Take over what the framework has written into state and groups by itself; False if there is nothing."""
        return False


def find_layout(groups: list[Group], given: list[list[Tensor]]) -> Layout:
    """How the parameters that the groups were made with stand in ``param_groups`` now."""
    if len(given) != len(groups):
        # DeepSpeed removes groups without parameters.
        given = [params for params in given if params]
    known = find("layout", groups, given) if len(given) == len(groups) else None
    layout: Layout = (known or Layout)(groups, given)
    return layout
