"""The models that are not the demo's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def algoperf_mnist() -> nn.Module:
    """AlgoPerf's model for its MNIST development workload: 784 inputs, 128 sigmoids, 10 classes."""
    return nn.Sequential(nn.Linear(784, 128), nn.Sigmoid(), nn.Linear(128, 10))


def mlp(inputs: int, classes: int) -> nn.Module:
    """Two hidden layers of 64 rectified units."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)
    )  # fmt: skip


def cnn(classes: int) -> nn.Module:
    """Two convolutions with GroupNorm over the 8 x 8 digits, then the mean over the image."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
    )  # fmt: skip


def logistic(inputs: int, classes: int) -> nn.Linear:
    """Multinomial logistic regression that starts at zero."""
    layer = nn.Linear(inputs, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class WordModel(nn.Module):
    """An LSTM that gives the logits of the next word at every position."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, words)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps words of shape (batch, length) to logits of shape (batch, length, words)."""
        hidden, _ = self.lstm(self.words(tokens))
        logits: Tensor = self.head(hidden)
        return logits


class LoRA(nn.Module):
    """A frozen linear layer and a trained B A of low rank beside it; B starts at zero (arXiv:2106.09685)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.empty(rank, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + x @ self.a.T @ self.b.T
        return out


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freezes a model and puts LoRA around every linear layer whose weight is its own."""
    for p in model.parameters():
        p.requires_grad_(False)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and sum(layer.weight is weight for weight in weights) == 1:
            outer, _, last = name.rpartition(".")
            setattr(model.get_submodule(outer), last, LoRA(layer, rank))
    return model
