"""The names in a DeepSpeed config."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from deepspeed.runtime.zero import utils

from ppsf_dist.deepspeed.config import build
from ppsf_dist.optimizers.adamw_schedulefree import AdamWScheduleFree, RAdamScheduleFree
from ppsf_dist.optimizers.prodigy import Prodigy
from ppsf_dist.optimizers.prodigy_plus import ProdigyPlusScheduleFree
from ppsf_dist.optimizers.sgd_schedulefree import SGDScheduleFree

OPTIMIZERS = (AdamWScheduleFree, RAdamScheduleFree, Prodigy, ProdigyPlusScheduleFree, SGDScheduleFree)


REFUSED = {
    **{
        f"{name}Closure": f"DeepSpeed calls step() without a closure: name {name}"
        for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
    },
    "ScheduleFreeWrapper": "it goes around another optimizer, and ZeRO puts other tensors in place of its parameters: "
    "name AdamWScheduleFree, SGDScheduleFree or ProdigyPlusScheduleFree",
}
"""Classes that no config can name, and why."""


def refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    """Refuse a class that cannot run under DeepSpeed.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"optimizer.type={name!r} of the DeepSpeed config cannot run: {REFUSED[name]}")


def register() -> None:
    """Let ``optimizer.type`` of a config name each class, at every ZeRO stage.

    DeepSpeed looks up names that it does not know among the attributes of ``torch.optim``, and steps partitions only
    with the types on its list.
    """
    for optimizer in OPTIMIZERS:
        setattr(torch.optim, optimizer.__name__, partial(build, optimizer))
        if optimizer not in utils.ZERO_SUPPORTED_OPTIMIZERS:
            utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
    for name in REFUSED:
        setattr(torch.optim, name, partial(refuse, name))
