"""Which shards are there, and who shares them? Found from the parameters themselves, at the first real step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist.sharding.registry import entries, find, load, who_knows
from ppsf_dist.sharding.shard import Shard, plain_shard
from ppsf_dist.sharding.team import Team, team_of_ranks


def find_shards(params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> list[Shard]:
    """The local shard of each parameter, in order.

    Plain tensors beside sharded ones are copies on every rank of theirs (``ignored_params`` of FSDP2). With nothing but
    plain tensors a process is on its own (one device, DDP), unless ``process_group`` says that several processes hold
    different parts of one model (pipeline stages).

    Raises:
        NotImplementedError: parameters of FSDP1, which hide their shape.
        ValueError: parameters lie in a way that is not supported.
    """
    refuse_unsupported(params)
    knows = [who_knows("shards", param) for param in params]
    plain = [plain_shard(param) for param, answer in zip(params, knows, strict=True) if answer is None]
    found: dict[str | None, Iterator[Shard]] = {None: iter(plain)}
    for answer in dict.fromkeys(known for known in knows if known is not None):
        own = [param for param, known in zip(params, knows, strict=True) if known == answer]
        found[answer] = iter(load(answer)(own, plain))
    shards = [next(found[answer]) for answer in knows]
    domains = {shard.domain for shard in shards if shard.domain}
    if domains:
        domain = max(domains, key=len)
    elif process_group is not None:
        domain = (dist.get_rank(),)
    else:
        domain = ()
    for shard in shards:
        if not shard.domain and domain:
            shard.repeat(domain)
    return shards


def refuse_unsupported(params: Sequence[Tensor]) -> None:
    """Refuse parameters of a framework that hides what a step needs.

    Raises:
        NotImplementedError: parameters of FSDP1.
    """
    for param in params:
        refuse = find("refused", param)
        if refuse is not None:
            refuse(param)


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


def check_calling_framework(groups: Sequence[dict[str, Any]]) -> None:
    """Let the framework that a call comes from, if any, refuse what it asks for and what cannot work.

    To be called at the head of every call that a framework makes: what was called before says nothing about who is
    calling now, and one optimizer may serve several engines after each other.

    Raises:
        ValueError: a framework is calling, and its config asks for what cannot work.
        NotImplementedError: the framework does what is not supported.
    """
    known = entries("caller")
    frame = inspect.currentframe()
    while frame is not None:
        # Every step walks the whole stack: no call that is not needed.
        for _, test, answer in known:
            if test(frame):
                load(answer)(frame, groups)
                return
        frame = frame.f_back


def drop_gathered_weights(model: nn.Module | None) -> None:
    """Let the next forward pass read the shards, which have changed, and not what modules keep of them."""
    if model is not None:
        for answer in dict.fromkeys(who_knows("module", module) for module in model.modules()):
            if answer is not None:
                load(answer)(model)


def drop_gathered_copies(params: Sequence[Tensor]) -> None:
    """The same where the model is not known: of some parameters, which have changed."""
    by_answer: dict[str, list[Tensor]] = {}
    for param in params:
        answer = who_knows("weights", param)
        if answer is not None:
            by_answer.setdefault(answer, []).append(param)
    for answer, own in by_answer.items():
        load(answer)(own)
