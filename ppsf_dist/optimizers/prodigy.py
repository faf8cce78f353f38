"""Prodigy: what a person constructs."""

from __future__ import annotations

import math
import warnings

import torch.distributed as dist

from ppsf_dist.methods.prodigy import PRODIGY
from ppsf_dist.optimizers.base import AdaptiveOptimizer, Params


class Prodigy(AdaptiveOptimizer):
    """Adam with a step size d that it finds itself, one for all parameters, on every layout.

    Arguments, defaults and numerics are those of prodigyopt 1.1.2. Where that raises or trains with another d on each
    rank (FSDP2, tensor parallelism, ZeRO), this one trains as on one device. What else differs is listed in
    ``docs/differences.md``: a group with lr 0 stands still, and a gradient that is not finite changes nothing.

    The d of a step comes from the sums of that same step. Where a framework steps in parts (ZeRO with several groups or
    sub-groups), gradients of all parts are held until the last of them has come.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies d. Leave it at 1.0; a schedule may change it. All groups must have the same, or 0 to stand still.
        betas: ``(beta1, beta2)``: decay of the momentum (0 for none) and of the second moment.
        beta3: decay of the sums that d is estimated from; None for sqrt(beta2).
        eps: added to the denominator, times d.
        weight_decay: decay of the weights.
        decouple: decay as AdamW does, by lr * d; otherwise it is added to the gradient.
        use_bias_correction: Adam's.
        safeguard_warmup: leave lr out of the denominator of d, so that a warm-up does not inflate it.
        d0: first step size.
        d_coef: multiplies the estimate of d.
        growth_rate: once it has left d0, d grows by at most this factor in a step, >= 1; inf for no limit.
        fsdp_in_use: accepted and unnecessary: shards are found by themselves.
        slice_p: every so-manyth element is looked at for d; 11 saves memory and costs no quality.
        reference_quirks: keep what d is estimated from in the dtype of the weights, as the reference does. False keeps
            it in fp32, which matters with bf16 weights: in bf16 the sums stall.
        process_group: ranks that share d, or None for all that the parameters live on.

    Raises:
        ValueError: an argument is out of range or misspelt, or groups disagree where they must not.

    Source: Mishchenko and Defazio, arXiv:2306.06101, algorithm 4.
    """

    method = PRODIGY

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        *,
        reference_quirks: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        if fsdp_in_use:
            warnings.warn(
                "fsdp_in_use=True is not needed: how parameters are sharded is found from themselves", stacklevel=2
            )
        super().__init__(params, {name: given[name] for name in self.method.arguments}, process_group=process_group)
