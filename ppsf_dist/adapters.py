"""Which shards are there? Chosen from the parameters themselves, at the first real step."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ppsf_dist.fsdp.shards import dtensor_shards
from ppsf_dist.methods.base import Method
from ppsf_dist.sharding import Shard, Team, plain_shard, team_of_ranks

Group = dict[str, Any]
Part = frozenset[int]
State = dict[Tensor, dict[str, Any]]

ENGINE_MODULE = "deepspeed.runtime.engine"


class Member(NamedTuple):
    """A trainable parameter, the index of its group, and its place among all parameters of the optimizer."""

    param: Tensor
    group: int
    identity: int


class Layout:
    """How an optimizer's parameters stand in ``param_groups``. In this class they are there themselves, all of them.

    A framework that puts tensors of its own in their place has a subclass. It may step them in several parts, each with
    a call of ``step()`` that shows only what belongs to it; all calls together are one step. Here a part is the places
    of its parameters among all parameters, and an empty one means all of them.

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
    def whole(self) -> Part:
        """All parts of a step."""
        return frozenset()

    def part(self, visible: Sequence[Group]) -> Part:
        """What a call of ``step()`` is about that finds these groups in ``param_groups``."""
        return frozenset()

    def signature(self, part: Part) -> Hashable:
        """What the plan for a part depends on."""
        return tuple([(id(p), group, p.device, p.dtype) for p, group, _ in self.members(part)])

    def members(self, part: Part) -> list[Member]:
        """The trainable parameters of a part, in order."""
        if part:
            some = [
                Member(self.groups[group]["params"][i], group, n) for n in sorted(part) for group, i in [self._at[n]]
            ]
            return [member for member in some if member.param.requires_grad]
        members, position = [], 0
        for index, params in enumerate(self.parameters()):
            for param in params:
                if param.requires_grad:
                    members.append(Member(param, index, position))
                position += 1
        return members

    @cached_property
    def _at(self) -> list[tuple[int, int]]:
        """Where each parameter stands: its group, and its index there."""
        return [(group, index) for group, params in enumerate(self._lists) for index in range(len(params))]

    @cached_property
    def places(self) -> dict[Tensor, int]:
        """The place of each parameter among all parameters."""
        return {param: place for place, param in enumerate(param for params in self._lists for param in params)}

    def shards(self, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> list[Shard]:
        """The local shard of each parameter, in order."""
        return find_shards(params, process_group)

    def refresh(self) -> None:
        """Let the model see that ``train()`` or ``eval()`` has changed the weights. Collective."""

    def state_dict(self, state: State) -> dict[str, Any] | None:
        """The state in the form that the framework's checkpoints need, or None if any form will do."""
        return None

    def load_state_dict(self, method: Method, state_dict: dict[str, Any], state: State) -> bool:
        """Load what :meth:`state_dict` made; False if it is something else."""
        return False

    def adopt(self, method: Method, state: State) -> bool:
        """Take over what the framework has written into state and groups by itself; False if there is nothing."""
        return False


class CopiesLayout(Layout):
    """``param_groups`` hold fp32 copies of 16-bit parameters; their framework copies them back after each step.

    DeepSpeed does so at stage 0. It begins with a step on zero gradients.
    """

    starts_with_zeros = True

    @staticmethod
    def fits(group: Group, given: Sequence[Tensor]) -> bool:
        """Whether a group holds copies of the trainable ones of the parameters that it was made with."""
        originals = [p for p in given if p.requires_grad and p.numel()]
        copies = group["params"]
        return len(originals) == len(copies) > 0 and all(
            type(copy) is Tensor and copy.shape == p.shape and copy.dtype == torch.float32 and p.element_size() == 2
            for copy, p in zip(copies, originals, strict=True)
        )

    def members(self, part: Part) -> list[Member]:
        places = {id(param): place for place, param in enumerate(p for params in self.given for p in params)}
        originals = {id(copy): original for copy, original in self._pairs()}
        return [
            Member(copy, index, places[id(originals[id(copy)])])
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


def check_calling_framework(groups: Sequence[Group]) -> None:
    """Let the framework that a call comes from, if any, refuse what it asks for and what cannot work.

    To be called at the head of every call that a framework makes: what was called before says nothing about the engine
    that is calling now, and one optimizer may serve several engines after each other.

    Raises:
        ValueError: a DeepSpeed engine is calling, and its config asks for what cannot work.
        NotImplementedError: that engine has pipeline stages.
    """
    engine = _calling_engine()
    if engine is not None:
        from ppsf_dist.deepspeed.config import check_engine

        check_engine(engine, groups)


def _calling_engine() -> Any:
    """The DeepSpeed engine that this call comes from, or None.

    Without ZeRO nothing about an optimizer or its tensors tells of the engine: only the stack leads there. Who has not
    imported DeepSpeed's engine is called by none.
    """
    module = sys.modules.get(ENGINE_MODULE)
    if module is None:
        return None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals is vars(module):
            caller = frame.f_locals.get("self")
            if isinstance(caller, module.DeepSpeedEngine):
                return caller
        frame = frame.f_back
    return None


def find_layout(groups: list[Group], given: list[list[Tensor]]) -> Layout:
    """How the parameters that the groups were made with stand in ``param_groups`` now."""
    if len(given) != len(groups):
        # DeepSpeed removes groups without parameters.
        given = [params for params in given if params]
    if len(given) != len(groups):
        return Layout(groups, given)
    replaced = [
        param for group, params in zip(groups, given, strict=True) if group["params"] is not params for param in params
    ]
    if any(hasattr(param, "_dp_group") or hasattr(param, "_z3_optimizer") for param in replaced):
        from ppsf_dist.deepspeed.layout import ZeroLayout

        return ZeroLayout(groups, given)
    if all(CopiesLayout.fits(group, params) for group, params in zip(groups, given, strict=True)):
        return CopiesLayout(groups, given)
    return Layout(groups, given)


def find_shards(params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> list[Shard]:
    """The local shard of each parameter, in order.

    Plain tensors beside DTensors are copies on every rank of the DTensors' mesh (``ignored_params`` of FSDP2). With
    nothing but plain tensors a process is on its own (one device, DDP), unless ``process_group`` says that several
    processes hold different parts of one model (pipeline stages).

    Raises:
        NotImplementedError: parameters of FSDP1, which hide their shape.
        ValueError: placements that no adapter understands.
    """
    for param in params:
        if hasattr(param, "_fsdp_flattened") and not isinstance(param, DTensor):
            raise NotImplementedError(
                f"a parameter of shape {tuple(param.shape)} is a flat slice made by FullyShardedDataParallel (FSDP1), "
                "which hides the shape that factored moments and the step size are computed from: use FSDP2, "
                "torch.distributed.fsdp.fully_shard(model)"
            )
    if any(getattr(param, "allreduce", True) is False and hasattr(param, "group_name") for param in params):
        from ppsf_dist.deepspeed.experts import shards_with_experts

        return shards_with_experts(params)
    sharded = iter(dtensor_shards([p for p in params if isinstance(p, DTensor)]))
    shards = [next(sharded) if isinstance(p, DTensor) else plain_shard(p) for p in params]
    domains = {shard.domain for shard in shards if shard.domain}
    if domains:
        domain = max(domains, key=len)
    elif process_group is not None:
        domain = (dist.get_rank(),)
    else:
        domain = ()
    for shard in shards:
        if not shard.domain and domain:
            shard.domain = domain
            shard.owner = dist.get_rank() == domain[0]
            shard.copied = len(domain) > 1
    return shards


def find_team(shards: Sequence[Shard], process_group: dist.ProcessGroup | None) -> Team:
    """The ranks that share sums: those of ``process_group``, or all that the parameters live on.

    Raises:
        ValueError: ``process_group`` leaves out ranks that hold pieces of the parameters, or no group is given and the
            parameters live on overlapping sets of ranks.
    """
    domains = {shard.domain for shard in shards if shard.domain}
    if process_group is not None:
        ranks = set(dist.get_process_group_ranks(process_group))
        for domain in domains:
            if not set(domain) <= ranks:
                raise ValueError(
                    f"process_group has ranks {sorted(ranks)}, but parameters are sharded over ranks {domain}: pass a "
                    "group that contains every rank of the whole model, torch.distributed.group.WORLD for instance"
                )
        return Team(process_group)
    union = tuple(sorted(set().union(*domains)))
    if len(domains) > 1 and union not in domains and len(union) != dist.get_world_size():
        raise ValueError(
            f"parameters live on the overlapping sets of ranks {sorted(domains)}: pass process_group=, the group of "
            "all ranks of the model, so that they share one step size"
        )
    return team_of_ranks(union)
