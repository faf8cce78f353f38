"""What it costs in quality to tune nothing: workloads, rivals, runs, tables and pictures of docs/quality.md."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The language model of the demo is a workload here; what is in launch/ imports its neighbours by their bare names.
sys.path.append(str(ROOT / "launch"))
