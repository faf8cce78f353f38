"""Exceptions raised in the middle of a step, and what is left of the optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import ppsf_dist
from ppsf_dist import ProdigyPlusScheduleFree
from tests.harness.counting import COLLECTIVE_NAMESPACES, NOT_COLLECTIVES
from tests.harness.layouts import LAYOUTS, set_grads, shard_parameters
from tests.harness.models import NamedShapes, gradient_sequence, initial_weights
from tests.runs import make_optimizer
from tests.switches import EVERY
from tests.thorough.damage import content, equal

SHAPES: NamedShapes = [("factored", (33, 34)), ("zero_small", (5, 3)), ("vector", (13,))]
PACKAGE = str(Path(ppsf_dist.__file__).parent)


class Fault(Exception):
    """A failed collective, a kernel that runs out of memory: what a step may meet."""


class Trap:
    """Raises at the point with the given number; counts the points that it passes. ``where`` says what is there."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        self.passed, self.raised, self.where = 0, False, ""
        self._error, self._at = error, at

    def point(self, where: str) -> None:
        self.passed += 1
        if self.passed - 1 == self._at:
            self.raised, self.where = True, where
            raise self._error


class _Operators(TorchDispatchMode):
    """A point before each operator, or before and after each collective."""

    def __init__(self, trap: Trap, collectives: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trap, self._collectives = trap, collectives

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        communicates = func.namespace in COLLECTIVE_NAMESPACES and func.overloadpacket.__name__ not in NOT_COLLECTIVES
        if communicates or not self._collectives:
            self._trap.point(f"before {func}")
        result = func(*args, **(kwargs or {}))
        if communicates and self._collectives:
            self._trap.point(f"after {func}")
        return result


class _Kernels:
    """A point before and after each call of the optimizer's kernels, and of what they prepare."""

    def __init__(self, inside: Any, trap: Trap) -> None:
        self.inside, self._trap = inside, trap

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inside, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self._trap.point(f"before {name}")
            result = value(*args, **kwargs)
            self._trap.point(f"after {name}")
            return _Kernels(result, self._trap) if name == "prepare" else result

        return call


Place = Callable[[ProdigyPlusScheduleFree, Trap], AbstractContextManager[None]]


@contextmanager
def operators(optimizer: ProdigyPlusScheduleFree, trap: Trap) -> Iterator[None]:
    with _Operators(trap, collectives=False):
        yield


@contextmanager
def collectives(optimizer: ProdigyPlusScheduleFree, trap: Trap) -> Iterator[None]:
    with _Operators(trap, collectives=True):
        yield


@contextmanager
def kernels(optimizer: ProdigyPlusScheduleFree, trap: Trap) -> Iterator[None]:
    # The one place that knows where an optimizer keeps them: those of the plans there are, and of new ones.
    engine: Any = optimizer._engine
    engine.kernels = _Kernels(engine.kernels, trap)
    for plan in engine.plans.values():
        plan.passes = _Kernels(plan.passes, trap)
    try:
        yield
    finally:
        engine.kernels = engine.kernels.inside
        for plan in engine.plans.values():
            plan.passes = plan.passes.inside


@contextmanager
def lines(optimizer: ProdigyPlusScheduleFree, trap: Trap) -> Iterator[None]:
    """A point before each line of the package, where a signal may come. Not in what cleans up after an exception."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if trap.raised or not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            trap.point(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


PLACES: dict[str, Place] = {"operator": operators, "collective": collectives, "kernel": kernels, "line": lines}
ERRORS: dict[str, type[BaseException]] = {"Fault": Fault, "KeyboardInterrupt": KeyboardInterrupt}

State = list[Any]


def nothing(optimizer: ProdigyPlusScheduleFree) -> None:
    pass


def another_lr(optimizer: ProdigyPlusScheduleFree) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.5


def evaluation(optimizer: ProdigyPlusScheduleFree) -> None:
    """In which a step is refused."""
    averages = optimizer.param_groups[0]["use_schedulefree"]
    optimizer.eval()
    if averages:
        try:
            optimizer.step()
        except RuntimeError:
            pass
        else:
            raise AssertionError("a step in eval mode was not refused")
    optimizer.train()


AFTERWARDS = (nothing, another_lr, evaluation)
"""What a person does between the exception and the next step."""


class Experiment:
    """Steps of one switch on one layout: so many ``before`` the one that is disturbed, and one after it."""

    def __init__(self, switch: str, layout: str, before: int) -> None:
        self._switch, self._layout, self._before = switch, layout, before
        self._gradients = list(gradient_sequence(SHAPES, before + 2))
        self._made: State = []
        self._expected: dict[Any, State] = {}

    def prepare(self) -> None:
        """Find out what is right: with the step and then ``afterwards``, and the other way round."""
        for afterwards in AFTERWARDS:
            optimizer, parameters = self._begun()
            self._step(optimizer, parameters, self._before)
            self._made = content_of(optimizer, parameters)
            afterwards(optimizer)
            self._step(optimizer, parameters, self._before + 1)
            self._expected[afterwards, "made"] = content_of(optimizer, parameters)
            optimizer, parameters = self._begun()
            afterwards(optimizer)
            self._step(optimizer, parameters, self._before)
            self._step(optimizer, parameters, self._before + 1)
            self._expected[afterwards, "undone"] = content_of(optimizer, parameters)

    def points(self, place: str) -> int:
        """How many points a step has."""
        optimizer, parameters = self._begun()
        trap = Trap(Fault, -1)
        set_grads(parameters, self._gradients[self._before])
        with PLACES[place](optimizer, trap):
            optimizer.step()
        return trap.passed

    def attempt(self, place: str, error: str, at: int) -> str:
        """Raise at a point, go on; what is wrong then, or an empty string."""
        trap = Trap(ERRORS[error], at)
        problem = self._go_on_after(PLACES[place], trap, ERRORS[error], AFTERWARDS[at % len(AFTERWARDS)])
        return f"{trap.where}: {problem}" if problem else ""

    def _go_on_after(
        self,
        place: Place,
        trap: Trap,
        error: type[BaseException],
        afterwards: Callable[[ProdigyPlusScheduleFree], None],
    ) -> str:
        optimizer, parameters = self._begun()
        set_grads(parameters, self._gradients[self._before])
        try:
            with place(optimizer, trap):
                optimizer.step()
        except error:
            pass
        if not trap.raised:
            return "the step never came to this point"
        try:
            made = everywhere(equal(content_of(optimizer, parameters), self._made))
            if made is None:
                return "one rank has made the step and another has not"
            afterwards(optimizer)
            if not made:
                self._step(optimizer, parameters, self._before)
            self._step(optimizer, parameters, self._before + 1)
        except Exception as failed:
            return f"{afterwards.__name__}: afterwards {type(failed).__name__}: {failed}"
        right = self._expected[afterwards, "made" if made else "undone"]
        state = "made" if made else "undone"
        return "" if equal(content_of(optimizer, parameters), right) else f"{state}, {afterwards.__name__}: ends apart"

    def _begun(self) -> tuple[ProdigyPlusScheduleFree, dict[str, Any]]:
        parameters: dict[str, Any] = dict(shard_parameters(initial_weights(SHAPES), LAYOUTS[self._layout]))
        optimizer = make_optimizer(parameters, 2, **EVERY[self._switch])
        for step in range(self._before):
            self._step(optimizer, parameters, step)
        return optimizer, parameters

    def _step(self, optimizer: ProdigyPlusScheduleFree, parameters: dict[str, Any], step: int) -> None:
        set_grads(parameters, self._gradients[step])
        optimizer.step()


def content_of(optimizer: ProdigyPlusScheduleFree, parameters: dict[str, Any]) -> State:
    return content(torch.nn.ParameterDict(parameters), optimizer)


def everywhere(here: bool) -> bool | None:
    """The answer of every rank, or None if they differ."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return here
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, here)
    return here if all(answer == here for answer in answers) else None


@dataclass(frozen=True)
class Plan:
    """Which points of a step to raise at.

    Attributes:
        place: one of ``PLACES``.
        errors: which of ``ERRORS`` to raise, in turn.
        both: raise each of them at each point, not one of them.
        every: distance between the points.
        before: steps before the one that is disturbed.
    """

    place: str
    errors: tuple[str, ...]
    both: bool = False
    every: int = 1
    before: int = 2


def attempts(switch: str, layout: str, plan: Plan) -> tuple[int, list[str]]:
    """Raise at the points of a step; how often, and what went wrong."""
    experiment = Experiment(switch, layout, plan.before)
    experiment.prepare()
    total = experiment.points(plan.place)
    tried, problems = 0, []
    for number, at in enumerate(range(0, total, plan.every)):
        for error in plan.errors if plan.both else plan.errors[number % len(plan.errors) :][:1]:
            tried += 1
            problem = experiment.attempt(plan.place, error, at)
            if problem:
                where = f"{error} at {plan.place} {at} of {total} in step {plan.before + 1}"
                problems.append(f"{switch} on {layout}, {where}: {problem}")
    return tried, problems
