"""ProdigyPlusScheduleFree: what a person constructs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.compiling import uncompiled
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from ppsf_dist.optimizers.base import AdaptiveOptimizer, Params

RECOMMENDED: Mapping[str, Any] = MappingProxyType(
    {"use_bias_correction": True, "schedulefree_c": 50, "reference_quirks": False}
)
"""The setting that docs/quality.md recommends: ``ProdigyPlusScheduleFree(model.parameters(), **RECOMMENDED)``.

Defaults are those of the reference, so that a run moves here unchanged. This is what trains best on the workloads that
were tried: steps that are not too long while d grows, an average that forgets the beginning, none of the oddities.
"""


class ProdigyPlusScheduleFree(AdaptiveOptimizer):
    """Prodigy's step size, Schedule-Free averaging and factored second moments: no learning rate, no schedule.

    The result does not depend on how parameters are sharded: give it the parameters of a model on one device, under
    DDP, or under ``fully_shard``, and d and the weights are those of one process.

    Call ``train`` before training and ``eval`` before evaluating or saving weights, where you call the model's,
    or evaluate inside ``ppsf_dist.averaged``.

    Every argument except ``params`` and those after the star can be set for each parameter group; ``split_groups``,
    ``split_groups_mean`` and ``fused_back_pass`` must agree.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies d. Leave it at 1.0; a schedule may change it.
        betas: ``(beta1, beta2)``: interpolation of Schedule-Free (or the decay of momentum without it), and decay of
            the second moment.
        beta3: decay of Prodigy's sums; None for sqrt(beta2).
        weight_decay: decay of the weights.
        weight_decay_by_lr: scale the decay by d * lr.
        d0: first step size.
        d_coef: multiplies the estimate of d.
        d_limiter: let d grow by at most 2^(1/4) in a step.
        prodigy_steps: stop adapting d after this many steps and free the memory for it; 0 or None for never.
        schedulefree_c: 0, or the C of refined Schedule-Free (arXiv:2507.07101), for large batches or long runs.
        eps: added to the denominator, times d; None for the atan2 form without one.
        split_groups: a step size for each parameter group.
        split_groups_mean: step by the harmonic mean of the groups' step sizes.
        factored: keep second moments as row and column means where a dimension is at least 32.
        factored_fp32: keep those means in fp32 whatever the dtype of the parameter.
        use_bias_correction: RAdam's rectification instead of none.
        use_stableadamw: bound the size of the update.
        use_schedulefree: average instead of a schedule; without it, momentum.
        use_speed: SPEED's rule for d.
        stochastic_rounding: round bf16 parameters stochastically.
        fused_back_pass: parameters are stepped during the backward pass, by ``step_param`` or by
            ``ppsf_dist.fsdp.step_in_backward``, and ``step()`` only ends the step.
        use_cautious: step only where the direction has the sign of the gradient.
        use_grams: take the sign from the gradient and the size from the momentum; without Schedule-Free.
        use_adopt: divide by the second moment before the step.
        use_orthograd: leave out of the gradient what lies along the weights.
        use_focus: a step of signs, towards the average of the weights.
        decouple_lr: former name of ``not weight_decay_by_lr``; deprecated.
        beta4: 0, and d never falls; above 0, d is the running average of its estimates with this decay, which may fall
            (0.99 to 0.999; lower is noisier), as in the first version of prodigy-plus-schedule-free; None for betas[1].
            Without effect on SPEED's rule.
        growth_rate: once it has left d0, d grows by at most this factor in a step, >= 1; inf for no further limit.
        reference_quirks: reproduce the oddities of the reference listed in ``docs/differences.md``.
        process_group: ranks that share the step size. Default: all that the parameters live on. Needed only where a
            rank holds no piece of some parameters, as in pipeline stages.
        seed: of stochastic rounding.

    Raises:
        ValueError: an argument is out of range or misspelt, groups disagree where they must not, or torch's
            ZeroRedundancyOptimizer builds this one.

    Sources: Mishchenko and Defazio, arXiv:2306.06101 (Prodigy); Defazio et al., arXiv:2405.15682 (Schedule-Free);
    Shazeer and Stern, arXiv:1804.04235 (factored moments); prodigy-plus-schedule-free 2.0.1 (their union, SPEED).
    """

    method = PRODIGY_PLUS

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        beta3: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        d_limiter: bool = True,
        prodigy_steps: int | None = 0,
        schedulefree_c: float = 0,
        eps: float | None = 1e-8,
        split_groups: bool = True,
        split_groups_mean: bool = False,
        factored: bool = True,
        factored_fp32: bool = True,
        use_bias_correction: bool = False,
        use_stableadamw: bool = True,
        use_schedulefree: bool = True,
        use_speed: bool = False,
        stochastic_rounding: bool = True,
        fused_back_pass: bool = False,
        use_cautious: bool = False,
        use_grams: bool = False,
        use_adopt: bool = False,
        use_orthograd: bool = False,
        use_focus: bool = False,
        *,
        decouple_lr: bool | None = None,
        beta4: float | None = 0.0,
        growth_rate: float = math.inf,
        reference_quirks: bool = True,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in self.method.arguments}
        if decouple_lr not in (None, True, False):
            raise ValueError(f"decouple_lr={decouple_lr!r} is out of range: allowed is None, True or False")
        if decouple_lr is not None:
            warnings.warn(
                f"decouple_lr={decouple_lr} is deprecated: pass weight_decay_by_lr={not decouple_lr}",
                DeprecationWarning,
                stacklevel=2,
            )
            defaults["weight_decay_by_lr"] = not decouple_lr
        super().__init__(params, defaults, process_group=process_group, seed=seed)

    @uncompiled
    @torch.no_grad()
    def step_param(self, p: Tensor, group: dict[str, Any] | None = None) -> None:
        """Step one parameter, so that its gradient can be freed. For hooks that run during the backward pass.

        Small parameters wait for each other, with copies of their gradients (4 MB at most), and are stepped together,
        at the end of the backward pass at the latest. Outside of one each is stepped at once.

        ``step()`` ends the step. For trainers that never call it, a parameter that comes a second time ends the step
        before, and so do ``eval()``, ``train()`` and ``state_dict()``. A parameter without a gradient changes nothing.
        To accumulate gradients, do not call this before the last backward pass.

        A gradient that is not finite leaves its parameter, those stepped with it, d and k as they were; what was
        stepped before stays stepped.

        Args:
            p: a parameter of this optimizer.
            group: accepted because trainers pass it. Arguments come from ``param_groups`` as they are now, also where a
                hook still holds a group that is no longer in use.

        Raises:
            ValueError: ``fused_back_pass`` is not set, or the parameter belongs to no group.
            RuntimeError: the parameter is sharded, or the optimizer is in eval mode.
        """
        if not self._engine.is_fused:
            raise ValueError("step_param() needs ProdigyPlusScheduleFree(..., fused_back_pass=True)")
        if p.grad is None:
            return
        self._engine.run_alone(p)

    def step_parameter(self, p: Tensor, group: dict[str, Any] | None = None, i: int | None = None) -> None:
        """The same as ``step_param`` for trainers that also pass the parameter's index in its group."""
        self.step_param(p, group)

    def supports_fused_back_pass(self) -> bool:
        """True; trainers ask."""
        return True
