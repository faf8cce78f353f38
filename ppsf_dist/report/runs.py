"""Runs as they lie on a disk: files of a monitor, and folders of ``launch/train.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppsf_dist.monitor.picture import series, settled_at

Row = Mapping[str, Any]

OF_THE_LOSS = ("loss", "train_loss")
OF_THE_VALIDATION = ("validation_loss", "val_loss", "eval_loss")
OF_THE_SPEED = ("tokens_per_second", "bytes_per_second")
LAST_PART = 0.1
"""Of a run: the mean of the loss over it is what the table shows."""


@dataclass
class Run:
    """One run.

    Attributes:
        name: that tells it from the others.
        settings: by name, those of the optimizer and of the program.
        rows: in the order of their steps, each with ``groups`` where there is a d.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def line(self, names: Sequence[str]) -> tuple[list[int], list[float]]:
        """Steps and values of the first of these numbers that the run has."""
        for name in names:
            found = series(self.rows, name)
            if found[0]:
                return found
        return [], []

    def ds(self) -> list[tuple[list[int], list[float]]]:
        """Steps and values of d, of each group that finds one."""
        groups = max((len(row["groups"]) for row in self.rows), default=0)
        lines = [
            series([row for row in self.rows if index < len(row["groups"])], "d", index) for index in range(groups)
        ]
        return [line for line in lines if line[0]]

    def summary(self) -> dict[str, str]:
        """What a table shows of the run, by heading."""
        _, losses = self.line(OF_THE_LOSS)
        _, validations = self.line(OF_THE_VALIDATION)
        _, speeds = self.line(OF_THE_SPEED)
        last = self.rows[-1]
        ds = [values[-1] for _, values in self.ds()]
        settled = settled_at(self.rows) if ds else None
        tail = losses[-max(1, round(len(losses) * LAST_PART)) :]
        found = {
            "steps": str(last["step"]),
            "loss": f"{sum(tail) / len(tail):.4f}" if tail else "",
            "lowest loss": f"{min(losses):.4f}" if losses else "",
            "validation loss": f"{validations[-1]:.4f}" if validations else "",
            "d": ", ".join(f"{d:.3e}" for d in ds),
            "settled at": "" if not ds else "not yet" if settled is None else str(settled),
            "skipped": str(last["skipped"]) if "skipped" in last else "",
            "tokens/s": f"{sorted(speeds)[len(speeds) // 2]:.0f}" if speeds else "",
            "seconds": f"{last['seconds']:.0f}" if "seconds" in last else "",
        }
        shares = self.line(("step_share",))[1]
        return found | {"in the step": f"{sum(shares) / len(shares):.0%}" if shares else ""}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, each with a name of its own.

    Args:
        paths: of a ``.jsonl`` file of a monitor, of a folder that holds one, or of a folder of ``launch/train.py``.

    Raises:
        FileNotFoundError: there is nothing, or no run, at a path.
        ValueError: a file has no row of a run, or a line of it is no JSON object; the message names both.
    """
    files = [_file(path) for path in paths]
    names = _names([path.with_suffix("") if path.is_file() else path for path in paths])
    return [_read(file, name) for file, name in zip(files, names, strict=True)]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which runs differ, by name; of each run its own value, empty where it has none."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    table = {name: [_shown(run.settings[name]) if name in run.settings else "" for run in runs] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run at {path}: give a .jsonl file of a Monitor, or a folder with one")
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        what = "no .jsonl file" if not found else f"{len(found)} .jsonl files, name one of them"
        raise FileNotFoundError(f"the folder {path} holds {what}: Monitor(optimizer, to='run.jsonl') writes one")
    return found[0]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    whole = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, whole), default=0) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{index}: {path.name}" for index, path in enumerate(paths)]


def _read(file: Path, name: str) -> Run:
    settings: dict[str, Any] = {}
    description = file.parent / "run.json"
    if description.exists():
        content = json.loads(description.read_text())
        settings |= {key: value for key, value in content.items() if key != "settings"} | content.get("settings", {})
    by_step: dict[int, dict[str, Any]] = {}
    for row in _lines(file):
        if "about" in row:
            settings |= row["about"]
        elif "step" in row:
            # A run that goes on from a checkpoint makes some steps again.
            for later in [step for step in by_step if step >= row["step"]]:
                del by_step[later]
            by_step[row["step"]] = _with_groups(row)
    if not by_step:
        raise ValueError(f"{file} holds no row of a run: a Monitor writes one for every so many steps")
    return Run(name, settings, list(by_step.values()))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                # A run that was killed left it half written.
                return
            raise ValueError(f"line {number} of {file} is no JSON: {error}; give the file of a Monitor") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {file} is no JSON object: give the file of a Monitor")
        yield row


def _with_groups(row: dict[str, Any]) -> dict[str, Any]:
    """Rows of launch/train.py have the number of one group."""
    return row if "groups" in row else row | {"groups": [{"d": row["d"]} if row.get("d") is not None else {}]}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
