"""The name in a DeepSpeed config."""

from __future__ import annotations

import torch
from deepspeed.runtime.zero import utils

from ppsf_dist.deepspeed.config import build
from ppsf_dist.optimizer import ProdigyPlusScheduleFree

CONFIG_NAME = "ProdigyPlusScheduleFree"


def register() -> None:
    """Let ``optimizer.type`` of a config name the optimizer, at every ZeRO stage.

    DeepSpeed looks up names that it does not know among the attributes of ``torch.optim``, and steps partitions only
    with the types on its list.
    """
    setattr(torch.optim, CONFIG_NAME, build)
    if ProdigyPlusScheduleFree not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(ProdigyPlusScheduleFree)
