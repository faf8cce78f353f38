"""The run that those under other launchers, and those that were interrupted, are compared with."""

from __future__ import annotations

import pytest

from tests.launch.hosts import STEPS, TINY, alone, metrics


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of an uninterrupted run in one process under plain python, with a validation after each step."""
    output = tmp_path_factory.mktemp("one_process")
    alone(*TINY, "--steps", str(STEPS), "--eval-every", "1", "--output", str(output))
    return metrics(output)
