"""What a framework may do between steps, in any order, against a twin that caches no plan.

The states and what leads from one to another: docs/architecture.md, "What may happen between steps".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

from ppsf_dist import SGDScheduleFree, averaged
from ppsf_dist.optimizers.base import DistributedOptimizer
from tests.runs import make_optimizer
from tests.test_state import same

SHAPES = {"matrix": (33, 3), "vector": (5,), "scalar": (), "late": (4, 2)}
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {}, "speed": {"use_speed": True}, "momentum": {"use_schedulefree": False},
    "frozen": {"prodigy_steps": 3}, "unfactored": {"factored": False}, "one_d": {"split_groups": False},
}  # fmt: skip


class Side:
    """One optimizer and its parameters; the forgetful one plans every step anew."""

    def __init__(self, kind: str, *, forgetful: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = {name: nn.Parameter(torch.randn(s, generator=generator)) for name, s in SHAPES.items()}
        self.forgetful, self.steps = forgetful, 0
        first = {name: p for name, p in self.parameters.items() if name != "late"}
        self.optimizer: DistributedOptimizer
        if kind == "sgd":
            groups = [{"params": list(first.values())[index::2]} for index in range(2)]
            self.optimizer = SGDScheduleFree(groups, lr=0.1)
        else:
            self.optimizer = make_optimizer(first, 2, **SWITCHES[kind])

    def fresh(self) -> DistributedOptimizer:
        """The optimizer, without a plan if it is the forgetful one."""
        if self.forgetful:
            self.optimizer._settle()
            self.optimizer._engine.forget("the twin caches nothing")
        return self.optimizer

    def give(self, missing: str, bad: bool) -> None:
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        for name, parameter in self.parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            if bad and name == "matrix":
                gradient[-1, -1] = torch.inf
            parameter.grad = None if name == missing or not parameter.requires_grad else gradient

    def content(self) -> Any:
        self.optimizer._settle()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = {name: dict(self.optimizer.state.get(p, {})) for name, p in self.parameters.items()}
        return [{name: p.detach() for name, p in self.parameters.items()}, state, groups]


class BetweenSteps(RuleBasedStateMachine):
    """Both sides do the same; the planned one must not notice that it has a plan."""

    @initialize(kind=st.sampled_from([*SWITCHES, "sgd"]))
    def begin(self, kind: str) -> None:
        self.sides = [Side(kind, forgetful=False), Side(kind, forgetful=True)]
        self.joined = False

    def both(self, action: Callable[[Side], object]) -> None:
        for side in self.sides:
            action(side)

    @rule(missing=st.sampled_from(["", "vector", "matrix"]), bad=st.booleans())
    def step(self, missing: str, bad: bool) -> None:
        def act(side: Side) -> None:
            side.give(missing, bad)
            side.fresh().train()
            side.optimizer.step()

        self.both(act)

    @rule()
    def a_closure_raises(self) -> None:
        def raises() -> float:
            raise ArithmeticError

        def act(side: Side) -> None:
            side.fresh().train()
            try:
                side.optimizer.step(raises)
            except ArithmeticError:
                return
            raise AssertionError("the closure's error is lost")

        self.both(act)

    @rule(group=st.integers(0, 1), lr=st.sampled_from([0.0, 0.5, 1.0]))
    def set_lr(self, group: int, lr: float) -> None:
        self.both(lambda side: side.optimizer.param_groups[group].update(lr=lr))

    @rule(group=st.integers(0, 1), decay=st.sampled_from([0.0, 0.1]))
    def set_weight_decay(self, group: int, decay: float) -> None:
        self.both(lambda side: side.optimizer.param_groups[group].update(weight_decay=decay))

    @rule(name=st.sampled_from(["matrix", "vector"]), trains=st.booleans())
    def freeze_or_thaw(self, name: str, trains: bool) -> None:
        self.both(lambda side: side.parameters[name].requires_grad_(trains))

    @rule()
    def a_group_joins(self) -> None:
        if self.joined:
            return
        self.joined = True
        self.both(lambda side: side.fresh().add_param_group({"params": [side.parameters["late"]]}))

    @rule()
    def state_is_saved_and_loaded(self) -> None:
        self.both(lambda side: side.optimizer.load_state_dict(copy.deepcopy(side.fresh().state_dict())))

    @rule()
    def state_is_offloaded_and_back(self) -> None:
        def act(side: Side) -> None:
            for entries in side.optimizer.state.values():
                for name, value in entries.items():
                    if isinstance(value, torch.Tensor):
                        entries[name] = value.clone()

        self.both(act)

    @rule()
    def weights_are_replaced(self) -> None:
        def act(side: Side) -> None:
            for parameter in side.parameters.values():
                parameter.data = parameter.data.clone()

        self.both(act)

    @rule()
    def evaluate(self) -> None:
        def act(side: Side) -> None:
            with averaged(side.fresh()):
                pass

        self.both(act)

    @rule()
    def evaluate_and_stay(self) -> None:
        self.both(lambda side: side.fresh().eval())

    @invariant()
    def both_are_the_same_bit_for_bit(self) -> None:
        if hasattr(self, "sides"):
            planned, forgetful = (side.content() for side in self.sides)
            assert same(planned, forgetful)


TestBetweenSteps = BetweenSteps.TestCase
TestBetweenSteps.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
