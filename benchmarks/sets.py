"""Sets of parameters as people train them, and their gradients."""

from __future__ import annotations

import torch
from torch import nn

Shapes = list[tuple[int, ...]]

RANK = 16
WIDTHS = (1024, 2048, 3072, 4096)
"""Of the adapters in the set "lora"."""


def _gpt2() -> Shapes:
    """The 148 tensors of GPT-2 small, 124 million elements."""
    d = 768
    block: Shapes = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def _llama() -> Shapes:
    """One layer of a model of 7 billion elements, 202 million of them."""
    d, hidden = 4096, 11008
    return [*[(d, d)] * 4, (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]


SETS: dict[str, Shapes] = {
    "gpt2": _gpt2(),
    "llama": _llama(),
    "mat4k": [(4096, 4096)],
    # Both halves of each adapter: A maps to the rank of 16, B from it and starts at zero.
    "lora": [*[(RANK, n) for n in WIDTHS], *[(n, RANK) for n in WIDTHS]] * 125,
    "tiny": [(16, 64)] * 500,
    "billion": [(4096, 4096)] * 60,
    # Kernels of 3 x 3 as in a ResNet, and the patch embedding of a vision transformer.
    "conv": [*[(256, 256, 3, 3)] * 4, *[(512, 512, 3, 3)] * 2, *[(768, 3, 16, 16)] * 2],
}


def starts_at_zero(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a set is the B of an adapter."""
    return name == "lora" and shape[1] == RANK


def elements(name: str) -> int:
    """How many a set has."""
    return sum(torch.Size(shape).numel() for shape in SETS[name])


def parameters(name: str, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """The parameters of a set, with gradients, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: torch.Size | tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    made = [nn.Parameter(random(shape, 0.0 if starts_at_zero(name, shape) else 0.02)) for shape in SETS[name]]
    for p in made:
        p.grad = random(p.shape, 0.01)
    return made
