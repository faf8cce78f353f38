"""The rows of ``docs/differences.md`` that are about parameter groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppsf_dist import ProdigyPlusScheduleFree
from tests.runs import make_optimizer
from tests.test_differences import D, gradients, start, step


@pytest.mark.parametrize("split_groups", [True, False])
@pytest.mark.parametrize("empty", [0, 1])
def test_o11_a_group_may_be_empty(empty: int, split_groups: bool) -> None:
    alone, beside = start(), start()
    groups: list[dict[str, Any]] = [{"params": [beside]}]
    groups.insert(empty, {"params": []})
    optimizer = ProdigyPlusScheduleFree(groups, d0=D, split_groups=split_groups)
    expected = ProdigyPlusScheduleFree([alone], d0=D)
    for g in gradients(6):
        step(optimizer, beside, g)
        step(expected, alone, g)
    assert torch.equal(alone, beside)
    assert optimizer.get_d()[1 - empty] == expected.get_d()[0]
    assert [group["k"] for group in optimizer.param_groups] == [7, 7]
    optimizer.eval()
    optimizer.train()
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, beside, gradients(1)[0])
    assert optimizer.param_groups[empty]["k"] == 8


def test_o11_all_groups_may_be_empty_at_first() -> None:
    optimizer = ProdigyPlusScheduleFree([{"params": []}], d0=D)
    optimizer.step()
    p = start()
    optimizer.add_param_group({"params": [p]})
    before = p.detach().clone()
    step(optimizer, p, torch.ones(48))
    assert not torch.equal(p, before)
    assert optimizer.get_d() == [D, D]


@pytest.mark.parametrize("split_groups", [True, False])
def test_o26_groups_hold_plain_values_and_the_same_keys(split_groups: bool) -> None:
    first, second = start(), start()
    optimizer = make_optimizer({"a": first, "b": second}, 2, split_groups=split_groups)
    for g in gradients(3):
        first.grad, second.grad = g, -g
        optimizer.step()
    for groups in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
        assert groups[0].keys() == groups[1].keys()
        for group in groups:
            assert group["growth_rate"] == math.inf
            values = [value for key, value in group.items() if key not in ("params", "growth_rate")]
            assert not any(isinstance(value, Tensor) for value in values)
            assert all(math.isfinite(value) for value in values if isinstance(value, float))


# ---- the same as in the reference ----
