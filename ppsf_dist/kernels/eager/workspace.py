"""Memory that the passes use again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """Named fp32 buffers that tiles reuse, so that a step allocates nothing of the size of a parameter."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._counting: dict[torch.device, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer of the given shape on the device of ``like``; its content is arbitrary."""
        key = (name, like.device, dtype)
        numel = 1
        for n in shape:
            numel *= n
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:numel].view(shape)

    def counting(self, like: Tensor, numel: int) -> Tensor:
        """0, 1, 2, ... as int32."""
        known = self._counting.get(like.device)
        if known is None or known.numel() < numel:
            known = torch.arange(numel, dtype=torch.int32, device=like.device)
            self._counting[like.device] = known
        return known[:numel]

    def load(self, name: str, pieces: Sequence[Tensor | None], size: Sequence[int]) -> Tensor:
        """The pieces as one fp32 tile, to be read only: a single fp32 piece is not copied."""
        single = pieces[0]
        if len(pieces) == 1 and single is not None and single.dtype == torch.float32:
            return single.unsqueeze(0)
        like = next(piece for piece in pieces if piece is not None)
        buffer = self.take(name, like, (len(pieces), *size))
        if len(pieces) == 1:
            return buffer.copy_(like.unsqueeze(0))
        present = [torch.zeros_like(like) if piece is None else piece for piece in pieces]
        if like.dtype == torch.float32:
            return torch.stack(present, out=buffer)
        return buffer.copy_(torch.stack(present))
