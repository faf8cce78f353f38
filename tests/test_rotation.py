"""What runs by default of a product of tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import rotation
from tests.rotation import KEPT, QUICK, QUICK_CASES, left_out, may_be_quick, quick, rotated

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


def test_the_default_keeps_some_and_thorough_runs_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"a.py::test_product": 2, "b.py::test_launcher": ("one", "two"), "c.py::test_host": 0}
    monkeypatch.setattr(rotation, "KEPT", table)
    product = [f"tests/a.py::test_product[{case}]" for case in "vwxyz"]
    launcher = [f"tests/b.py::test_launcher[{case}]" for case in ("one", "two", "three")]
    others = ["tests/c.py::test_host", "tests/c.py::test_another", "tests/d.py::test_product[w]"]
    assert left_out([*product, *launcher, *others]) == {product[1], product[3], launcher[2], others[0]}
    with pytest.raises(ValueError, match="test_launcher"):
        left_out(launcher[1:])


def test_quick_takes_folders_files_and_single_tests() -> None:
    names = [
        "algorithm/test_rounding.py::test_x",
        "test_reference.py::test_each_step_is[a]",
        "test_reference.py::test_y",
    ]
    assert quick([f"tests/{name}" for name in names]) == {f"tests/{name}" for name in names[:2]}
    assert may_be_quick("algorithm/test_rounding.py") and may_be_quick("test_reference.py")
    assert not may_be_quick("deepspeed/test_stages.py")
