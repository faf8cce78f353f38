"""The table of the groups' numbers: what goes in from ``param_groups``, and what comes back when."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppsf_dist.engine.group_numbers import OF_THE_STEP, GroupNumbers
from ppsf_dist.engine.host import HostAccess, PendingCopy
from ppsf_dist.methods.prodigy import PRODIGY
from ppsf_dist.methods.sgd_schedulefree import SGD_METHOD

CPU = torch.device("cpu")


class Controlled(HostAccess):
    """Copies that arrive when a test says so."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.free = False
        self.copies: list[Controlled.Copy] = []

    class Copy(PendingCopy):
        def __init__(self, values: Tensor) -> None:
            super().__init__(values, wants_event=False)
            self.arrived = False

        def take(self, *, wait: bool = False) -> Tensor | None:
            return super().take(wait=wait) if wait or self.arrived else None

    def start_copy(self, values: Tensor) -> PendingCopy:
        self.copies.append(Controlled.Copy(values))
        return self.copies[-1]


def groups(method: Any = PRODIGY, count: int = 2) -> list[dict[str, Any]]:
    return [{**method.arguments, **method.initial_numbers(method.arguments)} for _ in range(count)]


def test_it_begins_with_what_the_groups_hold() -> None:
    of = groups()
    of[1]["d"] = 0.25
    numbers = GroupNumbers(PRODIGY, of, HostAccess(CPU))
    assert numbers.rows == (*PRODIGY.numbers, *OF_THE_STEP)
    assert numbers["d"].tolist() == [1e-6, 0.25] and numbers.values.dtype == torch.float64


def test_what_somebody_writes_goes_in_and_nothing_else_does() -> None:
    of = groups()
    numbers = GroupNumbers(PRODIGY, of, HostAccess(CPU))
    numbers["d"].fill_(0.5)  # As a step has left it; the groups still show the d before.
    of[1]["d"] = 0.125
    numbers.absorb(of)
    assert numbers["d"].tolist() == [0.5, 0.125]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_said_once(value: float, caplog: pytest.LogCaptureFixture) -> None:
    of = groups()
    numbers = GroupNumbers(PRODIGY, of, HostAccess(CPU))
    of[1]["d"] = value
    with caplog.at_level(logging.WARNING, logger="ppsf_dist"):
        for _ in range(3):
            numbers.absorb(of)
    assert [record.message for record in caplog.records] == [
        f"d={value} in parameter group 1: steps change nothing until it is a finite number"
    ]


def test_arguments_are_copied_when_one_has_changed_into_the_same_memory() -> None:
    of = groups(SGD_METHOD)
    numbers = GroupNumbers(SGD_METHOD, of, HostAccess(CPU))
    before = numbers.hyper(of)["lr"]
    of[1]["lr"] = 0.25
    after = numbers.hyper(of)["lr"]
    assert after.tolist() == [1.0, 0.25] and after.data_ptr() == before.data_ptr()


def test_a_learning_rate_that_is_a_tensor_is_read_on_the_device_alone() -> None:
    of = groups(SGD_METHOD)
    of[0]["lr"] = torch.tensor([0.5])
    numbers = GroupNumbers(SGD_METHOD, of, HostAccess(CPU))
    assert numbers.hyper(of)["lr"].tolist() == [0.5, 1.0]
    of[0]["lr"].fill_(0.125)
    assert numbers.hyper(of)["lr"].tolist() == [0.125, 1.0]


def test_on_a_cpu_groups_show_a_step_at_once() -> None:
    of = groups()
    numbers = GroupNumbers(PRODIGY, of, HostAccess(CPU))
    numbers["d"].copy_(torch.tensor([0.5, 0.25]))
    numbers["k"].fill_(3)
    (news,) = numbers.end_step(of)
    assert [group["d"] for group in of] == [0.5, 0.25] and [n["d"] for n in news] == [0.5, 0.25]
    assert of[0]["k"] == 3 and isinstance(of[0]["k"], int)
    assert not set(OF_THE_STEP) & set(of[0])


def test_late_copies_come_in_order_and_each_once() -> None:
    of, host = groups(), Controlled()
    numbers = GroupNumbers(PRODIGY, of, host)
    seen: list[float] = []
    for step in range(1, 5):
        numbers["k"].fill_(step)
        seen += [news[0]["k"] for news in numbers.end_step(of)]
        assert of[0]["k"] == (seen[-1] if seen else 0)
        if step == 3:
            for copy in host.copies[:2]:
                copy.arrived = True
    # The second arrived before the fourth step began, the third and fourth have not.
    assert seen == [1, 2]
    assert [news[0]["k"] for news in numbers.publish(of)] == [3, 4]
    assert of[0]["k"] == 4 and numbers.publish(of) == []


def test_a_copy_that_overtakes_another_waits_for_it() -> None:
    of, host = groups(), Controlled()
    numbers = GroupNumbers(PRODIGY, of, host)
    for step in (1, 2):
        numbers["k"].fill_(step)
        numbers.end_step(of)
    host.copies[1].arrived = True
    assert numbers.end_step(of) == []
    host.copies[0].arrived = True
    assert [news[0]["k"] for news in numbers.end_step(of)] == [1, 2]


def test_what_somebody_writes_while_copies_are_under_way_is_not_lost() -> None:
    of, host = groups(), Controlled()
    numbers = GroupNumbers(PRODIGY, of, host)
    numbers["d"].fill_(0.5)
    numbers.end_step(of)
    of[0]["d"] = 0.125
    numbers.absorb(of)
    assert numbers["d"].tolist() == [0.125, 0.5]
