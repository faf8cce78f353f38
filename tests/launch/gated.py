"""launch/train.py, with a gate behind one step: rank 0 waits there until somebody makes a file.

A test that takes something away from a run in the middle of it finds the run there, however fast or slow it is.
PPSF_GATE is ``STEP:FILE``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
POLL_SECONDS = 0.02


def main() -> int:
    sys.path.insert(0, str(LAUNCH))
    import records
    import train

    step, _, file = os.environ["PPSF_GATE"].partition(":")

    class Gated(records.RunFolder):
        def append(self, row: Mapping[str, records.Number]) -> None:
            super().append(row)
            while row["step"] == int(step) and not Path(file).exists():
                time.sleep(POLL_SECONDS)

    train.RunFolder = Gated  # type: ignore[attr-defined]  # Where the run finds it.
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
