"""AdamWScheduleFree and RAdamScheduleFree: what a person constructs."""

from __future__ import annotations

import torch.distributed as dist

from ppsf_dist.methods.adamw_schedulefree import ADAMW_METHOD, RADAM_METHOD
from ppsf_dist.optimizers.base import DistributedOptimizer, Params


class AdamWScheduleFree(DistributedOptimizer):
    """AdamW with Schedule-Free averaging in place of momentum and of a schedule, on every layout.

    Arguments, defaults and numerics are those of schedulefree 1.4.1; what differs is said of
    ``ppsf_dist.SGDScheduleFree``, and so is when to call ``train`` and ``eval``.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, larger than that of a schedule by up to ten times; may be a tensor.
        betas: interpolation between z and the average, and decay of the second moment; each 0 <= beta < 1.
        eps: added to the denominator, > 0.
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

    method = ADAMW_METHOD

    def __init__(
        self,
        params: Params,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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


class RAdamScheduleFree(DistributedOptimizer):
    """The same with RAdam's rectification in place of a warm-up.

    Arguments, defaults and numerics are those of schedulefree 1.4.1; what differs is said of
    ``ppsf_dist.SGDScheduleFree``, and so is when to call ``train`` and ``eval``.

    Arguments that are not listed are as of ``ppsf_dist.AdamWScheduleFree``.

    Args:
        silent_sgd_phase: the first steps, in which the second moment says too little, have length 0; otherwise they are
            those of SGD with lr.

    Raises:
        ValueError: an argument is out of range or misspelt.

    Source: Liu et al., arXiv:1908.03265, algorithm 2, within arXiv:2405.15682.
    """

    method = RADAM_METHOD

    def __init__(
        self,
        params: Params,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        silent_sgd_phase: bool = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.method.arguments}, process_group=process_group)
