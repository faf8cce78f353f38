"""Tests with real DeepSpeed engines."""

import os

# Before DeepSpeed is imported: it chooses its accelerator then.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
