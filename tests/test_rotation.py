"""What runs by default of a product of tests."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.rotation import rotated


@pytest.mark.parametrize(("ones", "others"), [(12, 54), (12, 11), (12, 5), (5, 13), (11, 6)])
def test_every_value_meets_some_of_the_others(ones: int, others: int) -> None:
    pairs = [param.values for param in rotated(range(ones), range(others)) if not param.marks]
    everything = [param.values for param in rotated(range(ones), range(others))]
    assert sorted(everything) == [(one, other) for one in range(ones) for other in range(others)]
    first, second = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    assert len(first) == ones and len(second) == others
    assert min(second.values()) >= 2 and len(pairs) <= 2 * max(ones, others)
