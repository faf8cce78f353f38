"""SGDScheduleFree: what a person constructs."""

from __future__ import annotations

import torch.distributed as dist

from ppsf_dist.methods.sgd_schedulefree import SGD_METHOD
from ppsf_dist.optimizers.base import DistributedOptimizer, Params


class SGDScheduleFree(DistributedOptimizer):
    """SGD with Schedule-Free averaging in place of momentum and of a schedule, on every layout.

    Arguments, defaults and numerics are those of schedulefree 1.4.1, but that it begins in training mode (weights and
    their average are the same then), computes 16-bit weights in fp32 and keeps them aside in ``eval``, and changes
    nothing on a gradient that is not finite. Ranks exchange one small sum in a step, which tells of such a gradient; a
    process that holds all its parameters (one device, DDP) exchanges nothing.

    Call ``train`` before training and ``eval`` before evaluating or saving weights, where you call the model's,
    or evaluate inside ``ppsf_dist.averaged``. Every argument except ``params`` and those after the star can be set
    for each parameter group.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, larger than that of a schedule by up to ten times; may be a tensor.
        momentum: interpolation between z and the average, 0 <= momentum < 1.
        weight_decay: decay of the weights, at the training weights y, times lr.
        warmup_steps: the learning rate grows linearly over so many steps.
        r: the average weights a step by its number to this power.
        weight_lr_power: the average weights a step by the largest learning rate so far to this power.
        foreach: accepted and without effect: small tensors are always stepped together.
        process_group: ranks that tell each other of a bad gradient. Default: all that the parameters live on.

    Raises:
        ValueError: an argument is out of range or misspelt.

    Source: Defazio et al., "The Road Less Scheduled", arXiv:2405.15682, algorithm 1.
    """

    method = SGD_METHOD

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.method.arguments}, process_group=process_group)
