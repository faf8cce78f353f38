"""A small decoder transformer over bytes: pre-LN blocks, learned positions, input and output embedding tied."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import BYTE_VALUES

INIT_STD = 0.02
MLP_WIDTH = 4


class Block(nn.Module):
    """Causal self-attention and a two-layer MLP, each behind a LayerNorm and around a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, MLP_WIDTH * dim)
        self.mlp_out = nn.Linear(MLP_WIDTH * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        projected = self.query_key_value(self.attention_norm(x))
        query, key, value = projected.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, dim))
        hidden: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + hidden


class ByteTransformer(nn.Module):
    """Gives the logits of the next byte at every position.

    Args:
        dim: width of the residual stream, a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads in each block.
        max_length: bytes in the longest input.
    """

    def __init__(self, dim: int, layers: int, heads: int, max_length: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTE_VALUES, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, BYTE_VALUES, bias=False)
        self.head.weight = self.bytes.weight
        self.apply(_initialise)
        for block in self.blocks:
            assert isinstance(block, Block)
            # Every block adds to the residual stream twice: keep the sum of all at the scale of one.
            for last in (block.attention_out, block.mlp_out):
                nn.init.normal_(last.weight, std=INIT_STD / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps bytes of shape (batch, length) to logits of shape (batch, length, 256)."""
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Returns the mean cross-entropy in nats per byte of windows of shape (batch, length + 1)."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
