"""Schedule-Free averaging: the weight of a step in the average, and the moves between x, y and z.

y is where gradients are taken (the parameter's buffer in train mode), z the base sequence, x their average, which is
evaluated. Defazio et al., "The Road Less Scheduled", arXiv:2405.15682, equations 3-5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def averaging_weight(
    delta: Tensor, weight_sum: Tensor, beta1: Tensor, schedulefree_c: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of this step in the average, for vectors over groups (fp64).

    Args:
        delta: step length d * lr (rectified).
        weight_sum: sum of the squared step lengths so far.
        beta1: interpolation between z and x.
        schedulefree_c: 0, or the constant C of arXiv:2507.07101 that replaces ``1 / (1 - beta1)``; None
            where all are 0.

    Returns:
        ``c`` (share of z in the new average), ``q = 1 - beta1 (1 - c)`` (share of the step that y takes at once), and
        the new sum of weights.
    """
    c, total = share(delta * delta, weight_sum)
    if schedulefree_c is not None:
        scaled = (c * (1 - beta1) * schedulefree_c).clamp_max(1)
        c = torch.where(schedulefree_c > 0, scaled, c)
    return c, 1 - beta1 * (1 - c), total


def share(weight: Tensor, weight_sum: Tensor) -> tuple[Tensor, Tensor]:
    """The share of a step in the average, 0 where no step has had a weight yet, and the new sum of weights (fp64)."""
    total = weight_sum + weight
    return torch.where(total > 0, weight / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0), total


def warm_up(k: Tensor, warmup_steps: Tensor) -> Tensor:
    """The factor ``min(1, (k + 1) / warmup_steps)`` of the learning rate; 1 without a warm-up.

    Args:
        k: steps that have been made.
        warmup_steps: length of the warm-up, 0 for none.
    """
    return ((k + 1) / warmup_steps.clamp_min(1)).clamp_max(1)


def train_to_eval_weight(beta1: float) -> float:
    """Interpolation weight towards z that turns y into x: ``x = y + (1 - 1 / beta1) (z - y)``."""
    return 1 - 1 / beta1


def eval_to_train_weight(beta1: float) -> float:
    """Interpolation weight towards z that turns x into y: ``y = x + (1 - beta1) (z - x)``."""
    return 1 - beta1
