"""The operators of a step of the eager kernels without what is around them: how close those are to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.traffic import SLICE_P
from ppsf_dist.algorithm import step_size

TILE = 1 << 19
"""Elements that are stepped together: as many as the eager kernels take on a CPU."""


class _Tile:
    """Some lines of a matrix, with memory for what is computed of them, and its samples."""

    def __init__(
        self, parts: Sequence[Tensor], columns: Tensor, samples: dict[str, Tensor], at: int, memory: Tensor
    ) -> None:
        self.y, self.g, self.z, self.rows = parts
        self.columns = columns
        self.u, self.new_y = (part[: self.y.numel()].view_as(self.y) for part in memory)
        self.of_g, self.of_z = (tensor.view(-1)[-at % SLICE_P :: SLICE_P] for tensor in (self.g, self.z))
        first = -(-at // SLICE_P)
        self.p0, self.s = (samples[name][first : first + len(self.of_g)] for name in ("p0", "s"))


class Operators:
    """The three passes of a default step over whole fp32 matrices, tile by tile: no plan, no gates, no groups.

    The weights are of no use afterwards.

    Args:
        params: fp32, contiguous, on the CPU, with gradients that stay where they are.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        if any(p.dtype != torch.float32 or p.dim() > 2 or p.is_cuda for p in params):
            raise ValueError("the operators alone are measured on matrices and vectors in fp32 on a CPU")
        self.state: dict[Any, dict[str, Tensor]] = {}
        self._tiles: list[_Tile] = []
        memory = torch.empty(2, max(TILE, *(p.shape[-1] for p in params)))
        for p in params:
            assert p.grad is not None
            y, g = (tensor.detach().view(-1, p.shape[-1]) for tensor in (p, p.grad))
            z, rows, columns = torch.zeros_like(y), torch.zeros(len(y), 1), torch.zeros(1, y.shape[1])
            count = -(-p.numel() // SLICE_P)
            samples = {name: torch.zeros(count, dtype=torch.bfloat16) for name in ("p0", "s")}
            lines = max(1, TILE // y.shape[1])
            parts = zip(*(tensor.split(lines) for tensor in (y, g, z, rows)), strict=True)
            self._tiles += [_Tile(of, columns, samples, i * lines * y.shape[1], memory) for i, of in enumerate(parts)]
            self.state[p] = {"z": z, "rows": rows, "columns": columns, **samples}
        self._sum = torch.zeros((), dtype=torch.float64)
        self._numbers = [torch.tensor(x) for x in (1e-8, 1e-6, 0.01, 0.1, 0.99, 0.01)]

    @torch.no_grad()
    def step(self) -> None:
        eps, advance, share, q, beta3, weight = self._numbers
        for tile in self._tiles:
            torch.mul(tile.g, tile.g, out=tile.u)
            tile.rows.add_(tile.u.sum(1, keepdim=True))
            tile.columns.add_(tile.u.sum(0, keepdim=True))
            of_g = tile.of_g.contiguous()
            self._sum.add_((of_g * step_size.displacement(tile.p0, tile.of_z, torch.float32)).sum(dtype=torch.float64))
            s = step_size.gradient_sum(tile.s, beta3, weight, of_g, torch.float32)
            self._sum.add_(s.float().abs_().sum())
        for tile in self._tiles:
            u = self._direction(tile, eps)
            self._sum.add_(u.mul_(u).sum())
        for tile in self._tiles:
            u = self._direction(tile, eps).mul_(advance)
            new_y = torch.lerp(tile.y, tile.z, share, out=tile.new_y).addcmul_(u, q, value=-1)
            tile.s.copy_(step_size.gradient_sum(tile.s, beta3, weight, tile.of_g.contiguous(), torch.float32))
            new_z = torch.sub(tile.z, u, out=u)
            tile.y.copy_(new_y)
            tile.z.copy_(new_z)

    @staticmethod
    def _direction(tile: _Tile, eps: Tensor) -> Tensor:
        root = torch.mul(tile.rows, tile.columns, out=tile.u)
        return torch.div(tile.g, root.add_(eps), out=root)
