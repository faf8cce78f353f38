"""The output folder of a run: run.json, metrics.jsonl, the last checkpoint and the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

Number = float | int | None


class RunFolder:
    """Names, reads and writes what a run leaves behind. Only one rank may write.

    Args:
        path: the folder; it is made when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.picture = path / "training.png"
        self.checkpoint = path / "checkpoint"
        self._description = path / "run.json"
        self._metrics = path / "metrics.jsonl"

    def holds_a_run(self) -> bool:
        return self._metrics.exists() or self.checkpoint.exists()

    def clear(self) -> None:
        """Removes the files of an earlier run but for its checkpoint, and nothing else that lies in the folder."""
        for file in (self._description, self._metrics, self.picture):
            file.unlink(missing_ok=True)

    def begin(self, description: Mapping[str, object], after_step: int) -> None:
        """Writes run.json and drops the metrics later than `after_step`, which a resumed run writes again."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._description.write_text(json.dumps(description, indent=2) + "\n")
        kept = [row for row in self.rows() if (row["step"] or 0) <= after_step]
        self._metrics.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: Mapping[str, Number]) -> None:
        """Adds a line to metrics.jsonl. A number that is not finite becomes null, which JSON can hold."""
        clean = {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}
        with self._metrics.open("a") as file:
            file.write(json.dumps(clean) + "\n")

    def rows(self) -> list[dict[str, Number]]:
        """Returns the lines of metrics.jsonl, without a last one that a killed run left half written."""
        lines = self._metrics.read_text().splitlines(keepends=True) if self._metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def description(self) -> dict[str, object]:
        """Returns run.json, or an empty dictionary where there is none."""
        if not self._description.exists():
            return {}
        content: dict[str, object] = json.loads(self._description.read_text())
        return content


def run_of_checkpoint(checkpoint: Path) -> RunFolder:
    """Returns the folder of the run that wrote a checkpoint."""
    return RunFolder(checkpoint.absolute().parent)
