"""Hooks of steps and state dicts: what they see, may change, and may break."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ppsf_dist import ProdigyPlusScheduleFree
from tests.test_state import same
from tests.torch_suite.problem import build, params_of, steps, trained


def test_step_hooks() -> None:
    """Before and after the step, of this optimizer and of all."""
    optimizer, loss = trained()
    order: list[str] = []

    def say(name: str) -> Callable[..., None]:
        return lambda *_: order.append(f"{name}{optimizer.param_groups[0]['k']}")

    handles = [
        register_optimizer_step_pre_hook(say("all, before ")),
        register_optimizer_step_post_hook(say("all, after ")),
        optimizer.register_step_pre_hook(say("before ")),
        optimizer.register_step_post_hook(say("after ")),
    ]
    k = optimizer.param_groups[0]["k"]
    steps(optimizer, loss, 1)
    for handle in handles:
        handle.remove()
    steps(optimizer, loss, 1)
    assert order == [f"all, before {k}", f"before {k}", f"after {k + 1}", f"all, after {k + 1}"]


def test_step_pre_hook_may_change_the_arguments() -> None:
    optimizer, _ = trained()
    called = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: called.append(1)), {}))
    optimizer.step()
    assert called == [1]


def test_state_dict_pre_hook() -> None:
    optimizer, loss = trained()
    seen = []

    def hook(opt: Any) -> None:
        seen.append(opt.param_groups[0]["d"])
        opt.state["test"] = 1
        opt.state[params_of(opt)[0]]["mine"] = 2
        opt.param_groups[0]["note"] = "x"

    handle = optimizer.register_state_dict_pre_hook(hook)
    saved = optimizer.state_dict()
    assert seen == optimizer.get_d()
    assert saved["state"]["test"] == 1 and saved["state"][0]["mine"] == 2 and saved["param_groups"][0]["note"] == "x"
    handle.remove()
    optimizer.state_dict()
    assert len(seen) == 1
    # What a hook writes into the numbers is saved, and used.
    optimizer.register_state_dict_pre_hook(lambda opt: opt.param_groups[0].update(d=0.25))
    assert optimizer.state_dict()["param_groups"][0]["d"] == 0.25
    optimizer.register_state_dict_pre_hook(lambda opt: cast(ProdigyPlusScheduleFree, opt).eval(), prepend=True)
    assert not optimizer.state_dict()["param_groups"][0]["train_mode"]
    optimizer.train()
    steps(optimizer, loss, 1)
    assert optimizer.param_groups[0]["d_prev"] == 0.25


def test_state_dict_post_hook() -> None:
    optimizer, _ = trained()
    seen = []

    def change(opt: Any, state_dict: dict[str, Any]) -> None:
        seen.append(set(state_dict["state"][0]))
        state_dict["extra"] = 1

    handle = optimizer.register_state_dict_post_hook(change)
    assert optimizer.state_dict()["extra"] == 1 and {"z", "p0", "s"} <= seen[0]
    other = optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"replaced": state_dict["extra"]})
    assert optimizer.state_dict() == {"replaced": 1}
    other.remove()
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"first": dict(state_dict)}, prepend=True)
    handle.remove()
    assert set(optimizer.state_dict()) == {"first"}


def test_load_state_dict_pre_hook() -> None:
    """It sees the whole state dict, and what it returns, or does to it, is loaded; the caller's stays as it is."""
    source, _ = trained()
    saved = source.state_dict()
    replacing, changing = build(params_of(source)), build(params_of(source))
    seen = []

    def replace(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(set(state_dict["state"][0]))
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        return {"state": state_dict["state"], "param_groups": groups}

    def change(opt: Any, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"] = [{**group, "lr": 0.25} for group in state_dict["param_groups"]]

    for optimizer, hook, lr in ((replacing, replace, 0.125), (changing, change, 0.25)):
        handle = optimizer.register_load_state_dict_pre_hook(hook)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == lr and saved["param_groups"][0]["lr"] == 1.0
        assert len(optimizer.state) == 2 and same(saved["state"], optimizer.state_dict()["state"])
        handle.remove()
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 1.0
    assert {"z", "p0", "s"} <= seen[0]


def test_load_state_dict_post_hook() -> None:
    source, _ = trained()
    optimizer = build(params_of(source))
    seen: list[Any] = []
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(copy.deepcopy(opt.state_dict())))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(lambda opt, state_dict: seen.append("before"))
    optimizer.load_state_dict(source.state_dict())
    assert seen[:2] == ["before", "first"] and same(seen[2], source.state_dict())


def test_a_hook_that_raises_changes_nothing() -> None:
    source, loss = trained()
    saved = copy.deepcopy(source.state_dict())
    steps(source, loss, 1)
    before = copy.deepcopy(source.state_dict())

    def fail(*_: Any) -> None:
        raise KeyError("hook")

    for register in (source.register_load_state_dict_pre_hook, source.register_state_dict_pre_hook):
        handle = register(fail)
        with pytest.raises(KeyError):
            source.load_state_dict(saved) if "load" in register.__name__ else source.state_dict()
        handle.remove()
        assert same(before, source.state_dict())
