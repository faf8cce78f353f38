"""The workloads: what is trained, on which data, for how long, and what counts at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality import data, models
from model import ByteTransformer

LENGTH = 64
"""Tokens of a window."""
WINDOWS = 16
"""Windows of a batch."""
VALIDATION_WINDOWS = 256
AT_ONCE = 2048
"""Examples that are evaluated together."""
PRETRAINING_SEED, PRETRAINING_STEPS, PRETRAINING_LR = 1234, 800, 3e-3
RANK = 8
LOGISTIC_BATCH = 16
FIRST_SEED, SEEDS_AT_MOST, STEPS_AT_MOST = 10, 1 << 12, 1 << 20
"""Seeds below the first are for choosing settings."""


@dataclass(frozen=True)
class Task:
    """One training, drawn from a seed.

    Attributes:
        model: at its start. Frozen parameters need no gradient.
        loss: the training loss of a step, counted from 1: a function of the seed and the step alone.
        evaluate: what counts: a loss, and the share of right answers where there is one (else nan).
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    evaluate: Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Workload:
    """A model, its data and its budget.

    Attributes:
        title: one line for a table.
        steps: of a training.
        lr: where AdamW's was best with the first seed: the grids begin around it, and grow.
        counts: what ``Task.evaluate`` measures.
        task: makes a training from a seed.
        target: share of right answers that AlgoPerf asks for, or 0.
    """

    title: str
    steps: int
    lr: float
    counts: str
    task: Callable[[int], Task]
    target: float = 0.0


VALIDATION, TRAINING = "validation loss", "objective on the whole training set"


def _drawn(seed: int, step: int, size: int, below: int) -> Tensor:
    # A generator takes 32 bits of its seed.
    stream = (seed - FIRST_SEED) % SEEDS_AT_MOST * STEPS_AT_MOST + step
    return torch.randint(below, (size,), generator=torch.Generator().manual_seed(stream))


def _classifier(make: Callable[[], nn.Module], split: Callable[[], data.Split], batch: int) -> Callable[[int], Task]:
    def task(seed: int) -> Task:
        torch.manual_seed(seed)
        model, (train, validation) = make(), split()

        def loss(step: int) -> Tensor:
            chosen = _drawn(seed, step, batch, len(train.classes))
            return F.cross_entropy(model(train.inputs[chosen]), train.classes[chosen])

        def evaluate() -> tuple[float, float]:
            with torch.no_grad():
                logits = torch.cat([model(some) for some in validation.inputs.split(AT_ONCE)])
            right = (logits.argmax(1) == validation.classes).double().mean()
            return float(F.cross_entropy(logits, validation.classes)), float(right)

        return Task(model, loss, evaluate)

    return task


def _logistic(name: str, inputs: int, classes: int) -> Callable[[int], Task]:
    """Convex: ``mean cross-entropy + |weight|^2 / 2n`` over the n training examples, from weights of zero."""

    def task(seed: int) -> Task:
        model, (train, _) = models.logistic(inputs, classes), data.small(name)
        n = len(train.classes)

        def objective(chosen: Tensor | slice) -> Tensor:
            mean = F.cross_entropy(model(train.inputs[chosen]), train.classes[chosen])
            return mean + model.weight.square().sum() / (2 * n)

        def evaluate() -> tuple[float, float]:
            with torch.no_grad():
                return float(objective(slice(None))), float("nan")

        return Task(model, lambda step: objective(_drawn(seed, step, LOGISTIC_BATCH, n)), evaluate)

    return task


def _language(make: Callable[[], nn.Module], text: Callable[[], data.Text]) -> Callable[[int], Task]:
    def task(seed: int) -> Task:
        torch.manual_seed(seed)
        model, (train, validation) = make(), text()
        last = len(validation) - LENGTH - 1
        judged = _windows(validation, torch.arange(VALIDATION_WINDOWS) * last // (VALIDATION_WINDOWS - 1))

        def loss(step: int) -> Tensor:
            return _next_token_loss(model, _windows(train, _drawn(seed, step, WINDOWS, len(train) - LENGTH)))

        def evaluate() -> tuple[float, float]:
            with torch.no_grad():
                return float(torch.stack([_next_token_loss(model, some) for some in judged.split(64)]).mean()), float(
                    "nan"
                )

        return Task(model, loss, evaluate)

    return task


def _next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def _windows(text: Tensor, starts: Tensor) -> Tensor:
    return text[starts[:, None] + torch.arange(LENGTH + 1)].long()


def _transformer(dim: int, layers: int) -> Callable[[], nn.Module]:
    return lambda: ByteTransformer(dim, layers, heads=layers, max_length=LENGTH)


SMALL, LARGER = _transformer(48, 2), _transformer(96, 3)


@functools.cache
def _pretrained() -> dict[str, Tensor]:
    """Weights of the smaller language model after a training on code with AdamW and a cosine, the same in every run."""
    task = _language(SMALL, data.code)(PRETRAINING_SEED)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=PRETRAINING_LR, betas=(0.9, 0.99), weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for step in range(1, PRETRAINING_STEPS + 1):
        optimizer.zero_grad()
        task.loss(step).backward()
        optimizer.step()
        falling.step()
    return task.model.state_dict()


def _fine_tuned() -> nn.Module:
    model = SMALL()
    model.load_state_dict(_pretrained())
    return models.with_lora(model, RANK)


def _digits(make: Callable[[], nn.Module]) -> Callable[[int], Task]:
    return _classifier(make, functools.partial(data.small, "digits"), 64)


WORKLOADS = {
    "bytes-small-short": Workload(
        "byte language model, 71,616 parameters, 400 steps of 16 x 64 bytes of Python", 400, 2e-3, VALIDATION,
        _language(SMALL, data.code),
    ),
    "bytes-small-long": Workload(
        "the same, 1,000 steps", 1000, 4e-3, VALIDATION, _language(SMALL, data.code)
    ),
    "bytes-larger-short": Workload(
        "byte language model, 365,280 parameters, 250 steps of 16 x 64 bytes of Python", 250, 1e-3, VALIDATION,
        _language(LARGER, data.code),
    ),
    "bytes-larger-long": Workload(
        "the same, 500 steps", 500, 2e-3, VALIDATION, _language(LARGER, data.code)
    ),
    "words-lstm": Workload(
        "word language model, an LSTM, 400 steps of 16 x 64 words of Python's help texts", 400, 3.2e-2, VALIDATION,
        _language(functools.partial(models.WordModel, data.VOCABULARY, 64), data.help_words),
    ),
    "bytes-lora": Workload(
        "the smaller byte model, pre-trained on code, LoRA of rank 8, 300 steps of 16 x 64 bytes of English", 300,
        3.2e-2, VALIDATION, _language(_fine_tuned, data.help_bytes),
    ),
    "mnist": Workload(
        "AlgoPerf's MNIST: 784-128-10, sigmoid, 500 steps of 1,024 images", 500, 1.6e-2, VALIDATION,
        _classifier(models.algoperf_mnist, data.mnist, 1024), target=0.97,
    ),
    "digits-mlp": Workload(
        "scikit-learn's digits, 64-64-64-10, 400 steps of 64 images", 400, 3.2e-2, VALIDATION,
        _digits(functools.partial(models.mlp, 64, 10)),
    ),
    "digits-cnn": Workload(
        "scikit-learn's digits, two convolutions, 400 steps of 64 images", 400, 0.128, VALIDATION,
        _digits(functools.partial(models.cnn, 10)),
    ),
    "logistic-digits": Workload(
        "logistic regression on digits, 2,000 steps of 16 examples", 2000, 6.4e-2, TRAINING,
        _logistic("digits", 64, 10),
    ),
    "logistic-cancer": Workload(
        "logistic regression on breast_cancer, 2,000 steps of 16 examples", 2000, 1.6e-2, TRAINING,
        _logistic("breast_cancer", 30, 2),
    ),
    "logistic-diabetes": Workload(
        "logistic regression on diabetes (above the median or not), 2,000 steps of 16 examples", 2000, 1.6e-2, TRAINING,
        _logistic("diabetes", 10, 2),
    ),
}  # fmt: skip
