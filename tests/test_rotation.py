"""What runs by default of a product of tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.rotation import KEPT, QUICK, QUICK_CASES, left_out, quick, rotated

TESTS = Path(__file__).parent


@pytest.mark.parametrize(("ones", "others"), [(12, 54), (12, 11), (12, 5), (5, 13), (11, 6)])
def test_every_value_meets_some_of_the_others(ones: int, others: int) -> None:
    pairs = [param.values for param in rotated(range(ones), range(others)) if not param.marks]
    everything = [param.values for param in rotated(range(ones), range(others))]
    assert sorted(everything) == [(one, other) for one in range(ones) for other in range(others)]
    first, second = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    assert len(first) == ones and len(second) == others
    assert min(second.values()) >= 2 and len(pairs) <= 2 * max(ones, others)


@pytest.mark.parametrize("test", [*KEPT, *QUICK, *QUICK_CASES])
def test_what_the_tables_name_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    assert (TESTS / path).exists(), path
    assert not name or f"\ndef {name}" in (TESTS / path).read_text(), name


def test_the_default_keeps_some_and_thorough_runs_the_others() -> None:
    names = [f"tests/test_layouts.py::test_every_shape_in_every_role[{case}]" for case in "abcde"]
    launchers = ("torchrun", "mpich", "x")
    names += [f"tests/launch/test_same_everywhere.py::test_two_ranks_under[{launcher}]" for launcher in launchers]
    names += ["tests/bootstrap/test_launchers.py::test_deepspeed", "tests/test_other.py::test_anything[a]"]
    assert left_out(names) == {names[1], names[3], names[7], names[8]}
    with pytest.raises(ValueError, match="test_two_ranks_under"):
        left_out(names[5:6])
    assert quick(["tests/algorithm/test_rounding.py::test_x", "tests/test_work.py::test_y"]) == {
        "tests/algorithm/test_rounding.py::test_x"
    }
