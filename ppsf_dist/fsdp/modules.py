"""What FSDP2 keeps of weights between forward passes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule


def reshard(model: nn.Module | None) -> None:
    """Drop the gathered weights of every FSDP2 module, so that the next forward pass reads the shards.

    The root keeps its weights gathered after a forward pass unless told otherwise, and a change of the shards (a swap
    to the averaged weights) would not be seen. ``FSDPModule.reshard`` does not reach its children, so each is asked.
    """
    if model is None:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reshard_owners(params: Sequence[Tensor]) -> None:
    """The same where only parameters are known: torch lists the modules that are under ``fully_shard``."""
    own = set(map(id, params))
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            groups = module._get_fsdp_state()._fsdp_param_groups
            if any(group.is_unsharded and id(p.sharded_param) in own for group in groups for p in group.fsdp_params):
                module.reshard()
