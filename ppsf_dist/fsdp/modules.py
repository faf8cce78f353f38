"""What FSDP2 keeps of weights between forward passes."""

from __future__ import annotations

from torch import nn
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
