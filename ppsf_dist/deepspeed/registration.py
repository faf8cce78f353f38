"""The names in a DeepSpeed config."""

from __future__ import annotations

from functools import partial

import torch
from deepspeed.runtime.zero import utils

from ppsf_dist.deepspeed.config import build
from ppsf_dist.optimizers.adamw_schedulefree import AdamWScheduleFree, RAdamScheduleFree
from ppsf_dist.optimizers.prodigy import Prodigy
from ppsf_dist.optimizers.prodigy_plus import ProdigyPlusScheduleFree
from ppsf_dist.optimizers.sgd_schedulefree import SGDScheduleFree

OPTIMIZERS = (AdamWScheduleFree, RAdamScheduleFree, Prodigy, ProdigyPlusScheduleFree, SGDScheduleFree)


def register() -> None:
    """Let ``optimizer.type`` of a config name each class, at every ZeRO stage.

    DeepSpeed looks up names that it does not know among the attributes of ``torch.optim``, and steps partitions only
    with the types on its list.
    """
    for optimizer in OPTIMIZERS:
        setattr(torch.optim, optimizer.__name__, partial(build, optimizer))
        if optimizer not in utils.ZERO_SUPPORTED_OPTIMIZERS:
            utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
