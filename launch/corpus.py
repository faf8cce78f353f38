"""The text that every machine with Python has: the source of Python's standard library, as bytes."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BYTE_VALUES = 256
# Tests and vendored packages, and what differs between two machines with the same Python.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
# A file is validation text when the first byte of the hash of its name is below this: about a tenth of the files.
VALIDATION_BELOW = 26


@dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    Attributes:
        train: bytes of the training files, one after the other, uint8.
        validation: bytes of the other files, uint8.
        unigram_entropy: nats per byte on the validation text for a model that knows only how often each byte
            occurs in the training text. A language model that has learnt anything is below.
        sha256: of both texts, for the record: it changes with the Python version.
    """

    train: Tensor
    validation: Tensor
    unigram_entropy: float
    sha256: str

    def batch(self, seed: int, step: int, windows: int, length: int) -> Tensor:
        """Returns the training windows of a step, shape (windows, length), a pure function of the arguments.

        A run that is resumed, or that has another number of ranks, therefore sees the same data.
        """
        draw = random.Random(f"{seed}/{step}")
        last = len(self.train) - length
        return _windows(self.train, [draw.randint(0, last) for _ in range(windows)], length)

    def validation_windows(self, windows: int, length: int) -> Tensor:
        """Returns windows spread evenly over the validation text, shape (windows, length)."""
        last = len(self.validation) - length
        return _windows(self.validation, [last * i // max(1, windows - 1) for i in range(windows)], length)


@functools.cache
def standard_library() -> Corpus:
    """Reads the standard library of the running interpreter and splits it by file.

    Raises:
        FileNotFoundError: this Python was installed without the source of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(_sources(root))
    texts: dict[bool, list[bytes]] = {True: [], False: []}
    for name in names:
        texts[_is_validation(name)].append((root / name).read_bytes())
    if not texts[True] or not texts[False]:
        raise FileNotFoundError(
            f"the standard library at {root} has {len(names)} source files, too few to train on: "
            "use a Python that is installed with its source"
        )
    train, validation = b"".join(texts[False]), b"".join(texts[True])
    train_bytes = torch.frombuffer(bytearray(train), dtype=torch.uint8)
    validation_bytes = torch.frombuffer(bytearray(validation), dtype=torch.uint8)
    return Corpus(
        train=train_bytes,
        validation=validation_bytes,
        unigram_entropy=cross_entropy_of_counts(train_bytes, validation_bytes),
        sha256=hashlib.sha256(train + b"\0" + validation).hexdigest(),
    )


def cross_entropy_of_counts(train: Tensor, validation: Tensor) -> float:
    """Returns the nats per byte that the byte frequencies of `train` give to `validation`.

    Each count is one higher than it is, so that a byte that only the validation text has costs a finite amount.
    """
    counts = torch.bincount(train.long(), minlength=BYTE_VALUES).double() + 1.0
    frequencies = torch.bincount(validation.long(), minlength=BYTE_VALUES).double() / len(validation)
    return math.log(float(counts.sum())) - float(frequencies @ counts.log())


def _sources(root: Path) -> Iterator[str]:
    """Names of the files below a folder. What is left out is not even looked into: much may be installed there."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if _is_included(name)]
        inside = Path(folder).relative_to(root)
        yield from ((inside / name).as_posix() for name in files if name.endswith(".py") and _is_included(name))


def _is_included(name: str) -> bool:
    return name not in EXCLUDED_FOLDERS and not name.startswith(EXCLUDED_PREFIXES)


def _is_validation(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < VALIDATION_BELOW


def _windows(text: Tensor, starts: list[int], length: int) -> Tensor:
    return text[torch.tensor(starts)[:, None] + torch.arange(length)].long()
