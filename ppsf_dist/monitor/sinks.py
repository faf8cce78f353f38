"""Where rows go: a file, TensorBoard, Weights & Biases, MLflow, or a function. None of them is imported here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Sink = Callable[[Row], object]

PREFIX = "ppsf/"
"""Of every number in a tracker, so that they stand together there."""


def sink_of(target: Any) -> Sink:
    """The function that takes rows to a target.

    Args:
        target: a path, for a file with one JSON object in each line; a ``SummaryWriter`` of TensorBoard; a run of W&B;
            the module ``mlflow`` or its client's likes; or a function, which is given each row.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(target, str | os.PathLike):
        return JsonLines(Path(target))
    if callable(getattr(target, "add_scalar", None)):
        return lambda row: [target.add_scalar(name, value, row["step"]) for name, value in flat(row).items()]
    if callable(getattr(target, "log_metrics", None)):
        return lambda row: target.log_metrics(flat(row), step=row["step"])
    if callable(getattr(target, "log", None)):
        return lambda row: target.log(flat(row), step=row["step"])
    if callable(target):
        return target  # type: ignore[no-any-return]
    raise TypeError(
        f"to={target!r} takes no rows: allowed are a path for a .jsonl file, a SummaryWriter of TensorBoard, a run of "
        "W&B, the module mlflow, or a function of one row"
    )


def flat(row: Row) -> dict[str, float]:
    """The numbers of a row by one name each, those of a second group with its index; what is no number is left out."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name == "groups":
            for index, group in enumerate(value):
                before = PREFIX if len(value) == 1 else f"{PREFIX}{index}/"
                found |= {before + key: number for key, number in group.items() if number is not None}
        elif name != "step" and isinstance(value, int | float):
            found[PREFIX + name] = value
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


class JsonLines:
    """A file with one JSON object in each line. A run that goes on appends to it; one that begins starts it anew.

    Args:
        path: of the file; folders on the way are made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self, about: Mapping[str, Any], goes_on: bool) -> None:
        """Write what the run is, unless it goes on.

        Args:
            about: settings and the like.
            goes_on: whether steps have been made before.
        """
        if not (goes_on and self.path.exists()):
            self.path.write_text("")
        self(dict(about))

    def __call__(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(_clean(row), default=str) + "\n")


def _clean(value: Any) -> Any:
    """A number that is not finite becomes null, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return value
