"""State dicts: their keys, others' keys, copies, files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.test_state import same
from tests.torch_suite.problem import (
    Given,
    build,
    build_given,
    every_input,
    params_of,
    problem,
    steps,
    through_a_file,
    trained,
    trained_given,
)


@every_input
@pytest.mark.parametrize("named", [False, True])
def test_state_dict_deterministic(given: Given, named: bool) -> None:
    """A loaded copy with equal, not identical, parameters goes on equally and saves the same."""

    def made() -> tuple[DistributedOptimizer, Callable[[], Tensor]]:
        weight, bias, loss = problem()
        return build_given([("weight", weight), ("bias", bias)] if named else [weight, bias], given), loss

    optimizer, loss = made()
    steps(optimizer, loss)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other, other_loss = made()
    with torch.no_grad():
        for p, q in zip(params_of(other), params_of(optimizer), strict=True):
            p.copy_(q)
    other.load_state_dict(saved)
    assert same(kept, saved), "loading changes what it is given"
    steps(optimizer, loss)
    steps(other, other_loss)
    assert same(params_of(optimizer), params_of(other))
    assert same(optimizer.state_dict(), other.state_dict())
    assert same(kept, saved), "steps change what was saved"
    # Repeated parameters have identical representations (pytorch issue 36831).
    other.param_groups.extend(other.param_groups)
    assert same(optimizer.state_dict()["param_groups"][-1], other.state_dict()["param_groups"][-1])


def test_can_load_from_to_named_state_dict() -> None:
    for source in (False, True):
        for target in (False, True):
            weight, bias, loss = problem()
            plain, named = [weight, bias], [("weight", weight), ("bias", bias)]
            optimizer = build(named if source else plain)
            steps(optimizer, loss)
            other = build(named if target else plain)
            other.load_state_dict(optimizer.state_dict())
            expected = ["weight", "bias"] if source or target else None
            assert other.param_groups[0].get("param_names") == expected


@every_input
def test_save_load_equality_with_weights_only(given: Given) -> None:
    optimizer = trained_given(given)
    saved = optimizer.state_dict()
    assert same(saved, through_a_file(saved))


def test_load_nontensor_step() -> None:
    optimizer, loss = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = torch.tensor(entry["step"])
    optimizer.load_state_dict(saved)
    assert all(type(state["step"]) is float for state in optimizer.state.values())
    steps(optimizer, loss)


@every_input
def test_non_empty_state(given: Given) -> None:
    optimizer = trained_given(given)
    assert len(optimizer.state) == 2 and all(len(state) for state in optimizer.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_deepcopy_copies_all_public_attributes(copied: Any) -> None:
    """With hooks and a scheduler too, which replaces step(): a copy has neither, as torch's have not."""
    weight, bias, loss = problem()
    optimizer = build([weight, bias])
    optimizer.register_step_pre_hook(lambda *_: None)
    scheduler = StepLR(optimizer, step_size=3)
    steps(optimizer, loss)
    scheduler.step()
    other = copied(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")} - {"step"}
    assert public == {name for name in vars(other) if not name.startswith("_")}
    assert same(optimizer.state_dict(), other.state_dict())
    for p in params_of(other):
        p.grad = torch.ones_like(p)
    other.step()


def test_keys_of_others_survive() -> None:
    """A scheduler's initial_lr, a person's name, entries of the state of a parameter and of none."""
    optimizer, _ = trained()
    StepLR(optimizer, step_size=1)
    optimizer.param_groups[0]["name"] = "encoder"
    weight = params_of(optimizer)[0]
    optimizer.state[weight]["mine"] = torch.ones(3, dtype=torch.float64)
    optimizer.state[weight]["nested"] = {"a": [1, 2]}
    cast(Any, optimizer.state)["everyone"] = {"count": 3}
    saved = through_a_file(optimizer.state_dict())

    resumed = build(params_of(optimizer))
    resumed.load_state_dict(saved)
    assert same(saved, resumed.state_dict())
    assert resumed.param_groups[0]["name"] == "encoder" and cast(Any, resumed.state)["everyone"] == {"count": 3}
    assert resumed.state[weight]["mine"].dtype == torch.float64
    StepLR(resumed, step_size=1, last_epoch=2)
    weight.grad = torch.ones_like(weight)
    resumed.step()
    resumed.load_state_dict(saved)
    assert same(saved, resumed.state_dict())


def test_entries_of_others_before_the_first_step() -> None:
    weight, bias, loss = problem()
    optimizer = build([weight, bias])
    optimizer.state[weight]["mine"] = 1
    saved = optimizer.state_dict()
    assert saved["state"] == {0: {"mine": 1}}
    resumed = build([weight, bias])
    resumed.load_state_dict(saved)
    steps(resumed, loss)
    assert resumed.state[weight]["mine"] == 1 and "z" in resumed.state[weight]
