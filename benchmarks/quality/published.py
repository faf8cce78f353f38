"""Two rivals that no package ships, from their formulas, for this benchmark alone: one process, no checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class NAdamW:
    """Adam with Nesterov momentum and decoupled weight decay (NAdam: table 1 of arXiv:1910.05446).

    Args:
        params: to train.
        lr: learning rate of the step, set by the caller.
        betas, eps, weight_decay: as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        self.params, self.lr, self.betas, self.weight_decay, self.eps = list(params), lr, betas, weight_decay, eps
        self.k = 0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients of the parameters."""
        self.k += 1
        beta1, beta2 = self.betas
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 1 - beta1)
            v.lerp_(p.grad.square(), 1 - beta2)
            ahead = torch.lerp(m, p.grad, 1 - beta1) / (1 - beta1**self.k)
            p.mul_(1 - self.lr * self.weight_decay)
            p.addcdiv_(ahead, (v / (1 - beta2**self.k)).sqrt_().add_(self.eps), value=-self.lr)


class ScheduleFreePlus:
    """ScheduleFree+ (arXiv:2605.19095): AdamC inside Schedule-Free, its step a Polyak step from the loss.

    Without decay and annealing. The step is ``max(0, f(y) + beta <g, z - x>) / (sqrt(pi / 2) ||g||_1)``, and x is z for
    as long as it is warmed up.

    Args:
        params: to train.
        lr: what multiplies the Polyak step.
        betas: of Adam's moments.
        beta: how much of x is in y.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        beta: float = 0.9,
        eps: float = 1e-8,
    ) -> None:
        self.params, self.lr, self.betas, self.beta, self.eps = list(params), lr, betas, beta, eps
        self.k, self.size, self.largest, self.weight_sum = 0, 0.0, eps, 0.0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.x = [p.detach().clone() for p in self.params]
        self.z = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def step(self, loss: float, factor: float = 1.0) -> None:
        """One step with the gradients of the parameters.

        Args:
            loss: at which they were taken.
            factor: of the step, below 1 in the warm-up.
        """
        self.k += 1
        gradients = [p.grad for p in self.params if p.grad is not None]
        norm = sum(float(g.abs().sum()) for g in gradients) * math.sqrt(math.pi / 2)
        ahead = sum(float((g * (z - x)).sum()) for g, z, x in zip(gradients, self.z, self.x, strict=True))
        self.size = self.lr * factor * max(0.0, loss + self.beta * ahead) / norm
        self.largest = max(self.largest, self.size)
        weight = self.largest**2 if factor == 1.0 else 0.0
        self.weight_sum += weight
        share = weight / self.weight_sum if weight else 1.0
        for p, g, x, z, m, v in zip(self.params, gradients, self.x, self.z, self.m, self.v, strict=True):
            self._move(p, g, x, z, m, v, share)

    def _move(self, p: Tensor, g: Tensor, x: Tensor, z: Tensor, m: Tensor, v: Tensor, share: float) -> None:
        beta1, beta2 = self.betas
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        denominator = (v / (1 - beta2**self.k)).sqrt_().add_(self.eps)
        z.addcdiv_(m / (1 - beta1**self.k), denominator, value=-self.size)
        x.lerp_(z, share)
        p.copy_(torch.lerp(z, x, self.beta))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold x in the parameters, inside ``with``."""
        self._copy(self.x)
        yield
        for p, x, z in zip(self.params, self.x, self.z, strict=True):
            p.data.copy_(torch.lerp(z, x, self.beta))

    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self.params, values, strict=True):
            p.data.copy_(value)
