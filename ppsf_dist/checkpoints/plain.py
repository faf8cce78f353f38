"""Files of ``torch.save``, as long as they hold plain data."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

_REASON = re.compile(r"WeightsUnpickler error: (.*?\.)( |$)", re.MULTILINE)


def load_plain(file: Path | io.BytesIO, name: str, *, lazily: bool = False) -> Any:
    """What a file holds: tensors, plain data, and classes that are allowed by ``torch.serialization``.

    Args:
        file: to read.
        name: of it, for messages.
        lazily: leave the tensors in the file, which must then stay as it is.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        return torch.load(file, map_location="cpu", mmap=lazily, weights_only=True)
    except pickle.UnpicklingError as error:
        # The rest of torch's message explains how to run the code.
        reason = _REASON.search(str(error))
        raise ValueError(
            f"{name} is not read, because it is no plain data and may run code"
            f"{f' ({reason[1]})' if reason else ''}: if you know who made it, allow the classes that it needs with "
            "torch.serialization.add_safe_globals"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{name} is no file that torch has written, or is damaged: {error}") from error
