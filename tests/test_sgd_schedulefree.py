"""What is SGDScheduleFree's own: its errors. That it is its reference on every layout: ``tests/test_family.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ppsf_dist import SGDScheduleFree
from ppsf_dist.fsdp import step_in_backward


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1.0 is out of range: allowed is 0 <= beta < 1"),
        ({"warmup_steps": 2.5}, r"warmup_steps=2.5 is out of range: allowed is an integer >= 0"),
        ({"lr": -1.0}, r"lr=-1.0 is out of range"),
        ({"weight_decay": float("nan")}, r"weight_decay=nan is out of range"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDScheduleFree([nn.Parameter(torch.ones(2))], **arguments)


def test_an_argument_misspelt_in_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean warmup_steps"):
        SGDScheduleFree([{"params": [nn.Parameter(torch.ones(2))], "warmup_step": 3}])


def test_what_only_another_class_can_do_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"needs ProdigyPlusScheduleFree\(..., fused_back_pass=True\)"):
        step_in_backward(model, SGDScheduleFree(model.parameters()))  # type: ignore[arg-type]


def test_without_momentum_the_average_is_lost_and_eval_says_so() -> None:
    optimizer = SGDScheduleFree([nn.Parameter(torch.ones(2))], momentum=0.0)
    with pytest.raises(ValueError, match="momentum=0 in parameter group 0"):
        optimizer.eval()
