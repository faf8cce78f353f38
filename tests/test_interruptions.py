"""An exception at any point of a step, of ``eval()`` or ``train()``: what it has not begun it leaves, the rest it ends.

Every operator and every collective of a step is one point; a ctrl-C (``KeyboardInterrupt``) and an error are raised
before each of them in turn.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.layouts import LAYOUTS, Layout, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import SINGLE, make_optimizer
from tests.switches import EVERY, Switch
from tests.test_nonfinite import bits, same

SHAPES = named_shapes("small")
POINTS = 60
"""Points that are tried of each step, spread over all of it, the first and last of each collective among them."""


class RaiseAt(TorchDispatchMode):
    """Notes where collectives are among the operators, and raises before the operator of a given number."""

    def __init__(self, point: int | None, error: type[BaseException]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.point, self.error = 0, point, error
        self.collectives: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented
        if func.namespace == "profiler":
            # torch's own, around every step() of an optimizer.
            return func(*args, **(kwargs or {}))
        number, self.count = self.count, self.count + 1
        if number == self.point:
            raise self.error("interrupted")
        if func.namespace == "c10d":
            self.collectives.append(number)
        return func(*args, **(kwargs or {}))

    def points(self) -> list[int]:
        """Equally many points on every rank, each between the same two collectives on all of them."""
        bounds = [0, *(number + 1 for number in self.collectives), self.count]
        share = POINTS // (len(bounds) - 1)
        return [
            first + (last - 1 - first) * step // (share - 1)
            for first, last in itertools.pairwise(bounds)
            for step in range(share)
        ]


class Trial:
    """A run of three steps on a layout, of which the third is made again and again from the same beginning."""

    def __init__(self, layout: Layout, switch: Switch) -> None:
        self.parameters = shard_parameters(initial_weights(SHAPES), layout)
        self.optimizer = make_optimizer(self.parameters, 2, **switch)
        sequence = list(gradient_sequence(SHAPES, 4))
        for gradients in sequence[:2]:
            set_grads(self.parameters, gradients)
            self.optimizer.step()
        self.next, self.after = sequence[2], sequence[3]
        self.start = self._state()

    def _state(self) -> Any:
        return copy.deepcopy(
            ({name: p.detach().clone() for name, p in self.parameters.items()}, self.optimizer.state_dict())
        )

    def rewind(self) -> None:
        weights, state = copy.deepcopy(self.start)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])
        self.optimizer.load_state_dict(state)
        # The first step after loading makes a plan: that is not what is tried here.
        self.optimizer._engine.current_plan(frozenset())
        set_grads(self.parameters, self.next)

    def bits(self) -> list[Any]:
        self.optimizer.get_d()
        return bits(self.parameters, self.optimizer)

    def goes_on(self) -> list[Any]:
        set_grads(self.parameters, self.after)
        self.optimizer.step()
        return self.bits()


def interrupted_steps(layout: Layout, switch: Switch, error: type[BaseException]) -> dict[str, Any]:
    """What became of a step at each point: undone, done, or neither; and whether the run goes on rightly."""
    trial = Trial(layout, switch)
    trial.rewind()
    before = trial.bits()
    with RaiseAt(None, error) as counted:
        trial.optimizer.step()
    done = trial.bits()
    after = trial.goes_on()
    seen: dict[str, list[int]] = {"undone": [], "done": [], "torn": [], "silent": [], "wrong afterwards": []}
    for point in counted.points():
        trial.rewind()
        try:
            with RaiseAt(point, error):
                trial.optimizer.step()
            seen["silent"].append(point)
        except error:
            pass
        except RuntimeError as other:
            assert "interrupted" in str(other), other
        now = trial.bits()
        if same(now, before):
            seen["undone"].append(point)
            trial.optimizer.step()
        elif same(now, done):
            seen["done"].append(point)
        else:
            seen["torn"].append(point)
            continue
        if not same(trial.goes_on(), after):
            seen["wrong afterwards"].append(point)
    return seen


SWITCHES = ("default", "speed", "unfactored", "momentum", "adopt", "cautious", "weight_decay_not_by_lr", "focus")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_point_of_a_step_on_one_process(switch: str, error: type[BaseException]) -> None:
    seen = interrupted_steps(SINGLE, EVERY[switch], error)
    assert seen["torn"] == seen["silent"] == seen["wrong afterwards"] == []
    assert seen["undone"] and seen["done"] and max(seen["undone"]) < min(seen["done"])


@pytest.mark.dist
@pytest.mark.parametrize("switch", ["default", "cautious", "adopt"])
def test_every_point_of_a_step_on_two_ranks(switch: str) -> None:
    """Both ranks are interrupted between the same two collectives."""
    for seen in run(2, interrupted_steps, LAYOUTS["fsdp_2"], EVERY[switch], KeyboardInterrupt):
        assert seen["torn"] == seen["silent"] == seen["wrong afterwards"] == []
        assert seen["undone"] and seen["done"] and max(seen["undone"]) < min(seen["done"])


def interrupted_alone(layout: Layout, switch: Switch) -> list[tuple[str, str, bool]]:
    """An error on rank 1 alone, between two operators: what each rank has raised, what became of the step, and whether
    the run goes on rightly."""
    raises = dist.get_rank() == 1
    trial = Trial(layout, switch)
    trial.rewind()
    before = trial.bits()
    with RaiseAt(None, ValueError) as counted:
        trial.optimizer.step()
    done = trial.bits()
    after = trial.goes_on()
    seen = []
    for point in counted.points()[::3]:
        trial.rewind()
        message = ""
        try:
            with RaiseAt(point if raises else None, ValueError):
                trial.optimizer.step()
        except (ValueError, RuntimeError) as error:
            message = str(error)
        now = trial.bits()
        state = "undone" if same(now, before) else "done" if same(now, done) else "torn"
        if state == "undone":
            trial.optimizer.step()
        seen.append((message, state, same(trial.goes_on(), after)))
    return seen


@pytest.mark.dist
@pytest.mark.parametrize("switch", ["default", "cautious", "unfactored"])
def test_an_error_on_one_rank_in_the_middle_of_a_step_is_all_ranks(switch: str) -> None:
    others, own = run(2, interrupted_alone, LAYOUTS["fsdp_2"], EVERY[switch])
    for (heard, state, right), (raised, own_state, own_right) in zip(others, own, strict=True):
        assert state == own_state != "torn" and right and own_right
        assert raised == "interrupted"
        assert ("rank 1: ValueError: interrupted" in heard) == (state == "undone")
    assert {state for _, state, _ in others} == {"undone", "done"}
