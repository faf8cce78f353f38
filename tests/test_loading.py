"""What a checkpoint may hold: it is checked as arguments are, before anything changes."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

import pytest
import torch
from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference
from torch import nn

from ppsf_dist import ProdigyPlusScheduleFree
from tests.test_arguments import parameter, quiet
from tests.test_state import same

NAN, INF = math.nan, math.inf
DELETED = object()


def two_groups() -> ProdigyPlusScheduleFree:
    """One step of two parameters, the second of them factored."""
    optimizer = quiet([{"params": [nn.Parameter(torch.ones(3))]}, {"params": [nn.Parameter(torch.ones(40, 33))]}])
    one_step(optimizer)
    return optimizer


def one_step(optimizer: ProdigyPlusScheduleFree) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


GROUP_OF_A_CHECKPOINT: list[tuple[str, Any, str]] = [
    ("lr", NAN, "lr=nan is out of range"),
    ("d", None, "d=None is out of range"),
    ("d", -1, "d=-1 is out of range"),
    ("d", 1e-30, "d=1e-30 is out of range"),
    ("betas", (0.9, 2.0), r"betas\[1\]=2.0 is out of range"),
    ("use_cautious", "False", "use_cautious='False' is out of range"),
    ("k", 1.5, "k=1.5 is out of range"),
    ("k", 0, "k=0 is out of range"),
    ("weight_sum", INF, "weight_sum=inf is out of range"),
    ("skipped_steps", -1, "skipped_steps=-1 is out of range"),
    ("d_numerator", "a", "d_numerator='a' is out of range"),
    ("shared_d", 0.0, "shared_d=0.0 is out of range"),
    ("train_mode", 2, "train_mode=2 is out of range"),
    ("split_groups", False, "split_groups is True in group 0 and False in group 1"),
    *[(name, DELETED, f"has no '{name}'") for name in ("prev_d_numerator", "weight_sum", "d_numerator")],
    ("d", DELETED, "has no 'd'"),
    ("k", DELETED, "has no 'k'"),
]

STATE_OF_A_CHECKPOINT: list[tuple[str, Any, str]] = [
    *[(name, DELETED, f"no '{name}'") for name in ("z", "exp_avg_sq_col", "p0", "s")],
    ("exp_avg_sq_row", torch.ones(1, 1), r"exp_avg_sq_row has shape \(1, 1\), not \(1, 33\)"),
    ("exp_avg_sq_row", -torch.ones(1, 33), "exp_avg_sq_row is a mean of squares, but -1.0"),
    ("exp_avg_sq_col", torch.full((40, 1), NAN), "exp_avg_sq_col is not finite"),
    ("z", torch.ones(40), r"z has shape \(40,\)"),
    ("z", torch.ones(40, 33, dtype=torch.int64), "z is torch.int64"),
    ("z", [1.0], "z is a list"),
    ("s", torch.full((120,), INF), "s is not finite"),
    ("s", torch.zeros(3), "s has 3 samples, but 120 are needed"),
    ("s", torch.tensor(0.0), "s has shape"),
    ("p0", torch.tensor(1.0), "p0 has shape"),
    ("step", -1.0, "step=-1.0 is out of range"),
    ("step", NAN, "step=nan is out of range"),
]


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        *[("param_groups", *case) for case in GROUP_OF_A_CHECKPOINT],
        *[("state", *case) for case in STATE_OF_A_CHECKPOINT],
    ],
    # A tensor's text would be pages long, and an object's another one in each process.
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_checkpoint_is_checked_as_arguments_are(part: str, name: str, value: Any, says: str) -> None:
    """The second group or parameter is the wrong one: the first must not have been loaded."""
    optimizer = two_groups()
    damaged = copy.deepcopy(optimizer.state_dict())
    place = damaged[part][1]
    if value is DELETED:
        del place[name]
    else:
        place[name] = value
    one_step(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=says) as error:
        optimizer.load_state_dict(damaged)
    assert "of the checkpoint" in str(error.value) or "the checkpoint" in str(error.value)
    assert "group 1" in str(error.value) or "parameter 1" in str(error.value)
    assert same(before, optimizer.state_dict())
    one_step(optimizer)


def test_what_is_no_checkpoint_is_named() -> None:
    optimizer = two_groups()
    for nothing in ({}, {"model": 1, "optimizer": 2}):
        with pytest.raises(ValueError, match="has no 'param_groups'"):
            optimizer.load_state_dict(nothing)


def test_how_the_loop_is_written_does_not_come_from_a_checkpoint() -> None:
    p = parameter()
    fused, ordinary = quiet([p], fused_back_pass=True), quiet([p])
    for source, target, own in ((fused, ordinary, False), (ordinary, fused, True)):
        target.load_state_dict(source.state_dict())
        assert target.param_groups[0]["fused_back_pass"] is own
    before = p.detach().clone()
    p.grad = torch.ones(5)
    ordinary.step()
    assert not torch.equal(before, p)


def test_a_checkpoint_of_the_reference_after_prodigy_steps_and_before_any_state() -> None:
    for steps in (0, 5):
        p = nn.Parameter(torch.ones(40, 33))
        with contextlib.redirect_stdout(io.StringIO()):
            reference = Reference([p], prodigy_steps=2)
            for _ in range(steps):
                p.grad = torch.ones_like(p)
                reference.step()
        assert "p0" not in reference.state[p]
        optimizer = quiet([p])
        optimizer.load_state_dict(reference.state_dict())
        assert not set(optimizer.param_groups[0]) & {"running_d_numerator", "optimiser_version"}
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.get_d() == pytest.approx([reference.param_groups[0]["d"]])
        optimizer.load_state_dict(optimizer.state_dict())
