"""Which shards are there? Chosen from the parameters themselves, at the first real step."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ppsf_dist.fsdp.shards import dtensor_shards
from ppsf_dist.sharding import Shard, Team, plain_shard, team_of_ranks


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
