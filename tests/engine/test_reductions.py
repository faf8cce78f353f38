"""The all-reduces of a step that go on beside what a rank does."""

from __future__ import annotations

import pytest
import torch

from ppsf_dist.engine.reductions import Reductions, portions_of
from ppsf_dist.sharding.team import Pending, everyone
from tests.harness.pool import run


def interrupted() -> tuple[int, list[float]]:
    """How many sums have been counted after a ctrl-C between two of them, and the sums when all were waited for."""
    reductions = Reductions(
        everyone(), 1, [3, 2], torch.device("cpu"), sums_early=True, needs_norms=True, masks_late=False
    )
    reductions.begin()
    reductions.sums.copy_(torch.arange(5.0))
    reductions.start()
    reductions.start()
    finish, calls = Pending.finish, []

    def finish_or_not(pending: Pending) -> None:
        calls.append(pending)
        if len(calls) == 2:
            raise KeyboardInterrupt
        finish(pending)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pending, "finish", finish_or_not)
        with pytest.raises(KeyboardInterrupt):
            reductions.finish()
    counted = reductions._done
    reductions.finish()
    assert not reductions.decided
    reductions.reduce()
    assert reductions.decided
    return counted, reductions.sums.tolist()


@pytest.mark.dist
def test_a_sum_that_was_not_waited_for_is_not_taken_for_one_that_has_come() -> None:
    for counted, sums in run(2, interrupted):
        assert counted == 1
        assert sums == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_portions_are_about_equal_in_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppsf_dist.engine.reductions.OF_A_PORTION", 10)
    assert portions_of([100] * 8, [10] * 8) == [0, 2, 4, 6]
    assert portions_of([700, 100, 100, 100], [10] * 4) == [0, 1, 2, 3]
    assert portions_of([100] * 8, [1] * 8) == [0]
    assert portions_of([], []) == [0]
