"""What an optimizer is: the face of a method towards the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from enum import IntEnum
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ppsf_dist.methods.learning_rates import of_a_schedule, of_another_optimizer
from ppsf_dist.methods.rules import NOT_NEGATIVE, SWITCH, Rule, check_lr, checked, integer, shown
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches

Group = dict[str, Any]

AVERAGING = ("delta", "c", "q", "beta1", "weight_decay", "keep", "gain")
"""The coefficients of a method that has no others."""

_A_TYPO = 0.85
"""How like an argument a key must be to be taken for it: weight_decay_mult (0.83) may be meant, use_sped (0.94) not."""


class Cause(IntEnum):
    """Why a step changes nothing. Of several the largest counts; some of them count as skipped."""

    NOTHING = 0
    WEIGHTS = 1
    """Weights or state are not finite."""
    GRADIENT = 2
    """A gradient is not finite, or its square is not in fp32."""
    NUMBER = 3
    """A number of a group is not finite."""
    FAILURE = 4
    """A rank could not step, or has another plan."""


class Total(IntEnum):
    """What the parts of a step add up to, rows by groups."""

    NUMERATOR = 0
    DENOMINATOR = 1
    MOVED = 2
    """How many parameters have moved."""
    GRADIENT_SQUARE = 3
    """Sum of g^2."""
    UPDATE_SQUARE = 4
    """Square of the update's length before decay and masks. NaN where no pass measures it."""
    CAUSE = 5
    """The largest ``Cause`` of a part that changed nothing."""


def merged(parts: Sequence[Tensor]) -> Tensor:
    """The totals of several parts (rows by ``Total``)."""
    if len(parts) == 1:
        return parts[0]
    every = torch.stack(list(parts))
    return torch.cat((every[:, : Total.CAUSE].sum(0), every[:, Total.CAUSE].amax(0, keepdim=True)))


class Parameters(Protocol):
    """What the numbers of a step know of the parameters of a plan: vectors over them, on the device.

    Attributes:
        group_of: the group of each.
        updates: how many updates each has had.
        adopt_first: whether this is the first step of one that ADOPT steps.
        any_adopt, any_focus: whether there are such parameters at all.
    """

    group_of: Tensor
    updates: Tensor
    adopt_first: Tensor
    any_adopt: bool
    any_focus: bool


class GroupTable(Protocol):
    """The adaptive numbers of all groups on the device (``ppsf_dist.engine.group_numbers.GroupNumbers``)."""

    values: Tensor
    rows: tuple[str, ...]
    adaptive: tuple[str, ...]
    hyper_table: Tensor

    def __getitem__(self, name: str) -> Tensor: ...

    def hyper(self, groups: Sequence[Group]) -> dict[str, Tensor]: ...


class StepNumbers(ABC):
    """The numbers of one step that belong to a group: what it starts with, and what its parts add up to.

    A method's subclass sets ``delta``, ``c`` and ``q``: vectors over groups in fp64.

    Attributes:
        delta: length of the step.
        c: share of z in the new average; 0 where there is none.
        q: share of the step that y takes at once; 1 where there is no average.
        adapts: whether the sums of a group still count (bool); None where all do.
        pauses: whether a group stands still, sums and moments included (bool); None where none does.
        moves: whether a group is written, as far as that is known before the sums are (bool); None where all are.
        unsound: how many groups have a number that is not finite.
        backend: what computes them.
    """

    backend = "torch"
    delta: Tensor
    c: Tensor
    q: Tensor

    def __init__(self, numbers: GroupTable, groups: Sequence[Group], seed: int) -> None:
        self._numbers, self._groups, self.seed = numbers, groups, seed
        self.hyper = numbers.hyper(groups)
        self.adapts: Tensor | None = None
        self.pauses: Tensor | None = None
        self.moves: Tensor | None = None
        self._table: Tensor | None = None
        self._after: Tensor | None = None
        self._begin()

    def _begin(self) -> None:
        """What a step knows from its beginning on."""
        self.k = self._numbers["k"].clone()
        self.unsound = (~(self._numbers.hyper_table.isfinite().all(0) & self._is_sound())).sum()

    def _is_sound(self) -> Tensor:
        """Whether each group's adaptive numbers are finite."""
        return torch.stack([self._numbers[name] for name in self._numbers.adaptive]).isfinite().all(0)

    def table(self, names: Sequence[str]) -> Tensor:
        """The coefficients of these names by groups, in fp32, each rounded once. Computed once in a step."""
        if self._table is None:
            named = self.coefficients()
            self._table = torch.stack([named[name] for name in names]).float()
        return self._table

    def coefficients(self) -> dict[str, Tensor]:
        """The numbers that scale the formulas, by name: vectors over groups.

        These are those of Schedule-Free; what else its formulas need a method adds, and lists all of them in
        ``Method.coefficients``.
        """
        h, delta, one = self.hyper, self.delta, torch.ones_like(self.k)
        return {
            "delta": delta,
            "c": self.c,
            "q": self.q,
            "beta1": h["beta1"],
            "weight_decay": h["weight_decay"],
            "keep": 1 - h["weight_decay"] * delta,
            "gain": one,
        }

    def of_parameters(self, of: Parameters) -> dict[str, Tensor]:
        """Those that are not the same for all parameters of a group: vectors over parameters."""
        return {}

    def contributions(self, stats: Tensor, of: Any, counted: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Each parameter's share in the numerator and denominator of its group's step size, where it counts.

        The weight of a step in them is the group's, and comes later.

        Args:
            stats: sums of all ranks, parameters by ``ppsf_dist.methods.sums.Stat``.
            of: the parameters.
            counted: bool vector over parameters: those that count.
            after: the numbers of the parameters after the step; what the method remembers of one goes in here.
        """
        return stats[:, Stat.DOT], stats[:, Stat.S_L1]

    def learn(self, totals: Tensor) -> None:
        """Take in the sums of all parts before anything is written: where ``Method.d_timing`` is "current".

        Args:
            totals: rows by ``Total``. Coefficients and ``moves`` are asked for again afterwards.
        """
        return

    def commit(self, totals: Tensor) -> None:
        """The numbers after the step. Only the count of causes if it was void.

        An exception leaves them as they were, or as they will be: call it again to bring it to its end.

        Args:
            totals: what its parts add up to, rows by ``Total``.
        """
        if self._after is None:
            self._after = self._numbers_after(totals)
        self._numbers.values.copy_(self._after)

    def _numbers_after(self, totals: Tensor) -> Tensor:
        rows, old = self._numbers.rows, self._numbers.values
        cause = totals[Total.CAUSE]
        ok = (cause == Cause.NOTHING).all()
        if self.moves is not None:
            ok &= self.moves.any()
        new = dict(zip(rows, old, strict=True))
        new["k"] = new["k"] + 1
        self._adapt(new, totals)
        after = torch.where(ok, torch.stack(list(new.values())), old)
        # Also of a step that was void.
        after[rows.index("skipped_steps")].add_((cause == Cause.GRADIENT) | (cause == Cause.NUMBER))
        after[rows.index("failures")].add_(cause == Cause.FAILURE)
        void = after[rows.index("cause")]
        void.copy_(torch.where(ok, void, cause))
        norms = totals[Total.GRADIENT_SQUARE : Total.CAUSE].sqrt()
        for name, norm in zip(("gradient_norm", "update_norm"), norms, strict=True):
            after[rows.index(name)].copy_(norm)
        return after

    @abstractmethod
    def _adapt(self, numbers: dict[str, Tensor], totals: Tensor) -> None:
        """Put the adaptive numbers after the step in place of those before it.

        Args:
            numbers: by name, vectors over groups.
            totals: what the parts of the step add up to, rows by ``Total``.
        """


class Method(ABC):
    """What an optimizer is. One object serves all optimizers of a class: it holds no state of a run.

    Attributes:
        name: of the class that a person constructs.
        arguments: of a group, with their defaults.
        wide: arguments that belong to the whole optimizer, so all groups must agree on them.
        rules: what arguments allow that are one number or switch each; lr has its own.
        numbers: the adaptive numbers of a group, with their start.
        number_rules: what those allow.
        coefficients: names of the numbers of a step that scale its formulas.
        d_timing: "next": a step writes with the d that it began with. "current": with the d that its own sums make, so
            that of a step in several parts nothing is written before the last of them has its sums.
        hyper: numbers that are read from a group's arguments at each step (``hyper_row`` fills them).
        structural: arguments that decide which state there is: a checkpoint made with other ones does not fit.
        younger: arguments that the reference and the checkpoints of earlier releases do not have.
        foreign: what the reference keeps in groups and state for itself and nothing here needs.
        interpolation: the argument that is beta1, as messages name it.
        step_numbers: the numbers of one step.
    """

    name: str
    arguments: Mapping[str, Any]
    wide: tuple[str, ...] = ()
    rules: Mapping[str, Rule]
    numbers: Mapping[str, float]
    number_rules: Mapping[str, Rule]
    coefficients: tuple[str, ...] = AVERAGING
    d_timing: Literal["next", "current"] = "next"
    hyper: tuple[str, ...]
    structural: tuple[str, ...] = ()
    younger: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    interpolation: str
    step_numbers: type[StepNumbers]
    first_lr: Rule = NOT_NEGATIVE

    @abstractmethod
    def switches(self, group: Mapping[str, Any]) -> Switches:
        """Which formulas a validated group runs."""

    def switches_now(self, group: Mapping[str, Any]) -> Switches:
        """The same at this step: without statistics once the group's step size is frozen."""
        switches = self.switches(group)
        return replace(switches, statistics=switches.statistics and not self.is_frozen(group))

    @abstractmethod
    def hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """The arguments of a group as numbers, in the order of ``hyper``."""

    @abstractmethod
    def beta1(self, group: Mapping[str, Any]) -> float:
        """Interpolation of Schedule-Free between z and x."""

    def is_frozen(self, group: Mapping[str, Any]) -> bool:
        """Whether the step size of a group no longer adapts."""
        return False

    def initial_numbers(self, group: Mapping[str, Any]) -> Group:
        """The adaptive numbers of a new group, as plain numbers."""
        return {**self.numbers, "k": int(self.numbers["k"]), "skipped_steps": 0}

    def plain_number(self, name: str, value: float) -> float | int | None:
        """An adaptive number as ``param_groups`` show it."""
        return int(value) if name in ("k", "skipped_steps") else value

    def validate_group(self, group: MutableMapping[str, Any], *, lr_may_be_zero: bool = True) -> None:
        """Check the arguments of one parameter group, and make them Python's own numbers.

        Args:
            group: the group's arguments; changed in place.
            lr_may_be_zero: false for the constructor's ``lr``. A group may pause at 0, and schedules may reach it.

        Raises:
            ValueError: an argument is out of range. The message names it, its value and what is allowed.
        """
        check_lr(group, NOT_NEGATIVE if lr_may_be_zero else self.first_lr)
        for name, rule in self.rules.items():
            group[name] = checked(name, group[name], rule)

    def validate_numbers(self, group: MutableMapping[str, Any]) -> None:
        """Check what a parameter group has learned in a run, and make it Python's own numbers. Arguments come first.

        Raises:
            ValueError: a number is out of range. The message names it, its value and what is allowed.
        """
        for name, rule in {**self.number_rules, "skipped_steps": integer(0), "train_mode": SWITCH}.items():
            group[name] = checked(name, group[name], rule)

    def settle(self, group: MutableMapping[str, Any]) -> list[str]:
        """Switch off what another switch of a validated group excludes.

        Returns:
            What a person should know of: what was switched off, and what is allowed but seldom meant.
        """
        return []

    def doubt_about_lr(self, lr: float) -> str | None:
        """What to say of the learning rate that a run begins with, if it is seldom meant."""
        return of_another_optimizer(lr) if "d" in self.numbers else None

    def doubt_about_schedule(self, group: Mapping[str, Any], before: float, now: float) -> str | None:
        """What to say of a learning rate that has changed since the last step, if that is seldom meant."""
        return of_a_schedule(before, now, finds_d="d" in self.numbers) if self.switches(group).schedulefree else None

    def refuse_unknown(self, group: Mapping[str, Any], elsewhere: Iterable[str]) -> None:
        """Refuse a key of a parameter group that is an argument misspelt, or one of the whole optimizer.

        Other keys are a person's own (``name``), or a scheduler's (``initial_lr``), and stay where they are.

        Args:
            group: as it was given.
            elsewhere: names of arguments that only the constructor takes.

        Raises:
            ValueError: the message names the key and what to write in its place.
        """
        known = {*self.arguments, *self.numbers, "train_mode", "params", "param_names", "state_version"}
        for name in group:
            if name in elsewhere:
                raise ValueError(
                    f"{name}={shown(group[name])} stands in a parameter group, but it belongs to the whole optimizer: "
                    f"give it to the constructor, {self.name}(..., {name}=)"
                )
            meant = [] if name in known else get_close_matches(str(name), self.arguments, n=1, cutoff=_A_TYPO)
            if meant:
                raise ValueError(
                    f"{name}={shown(group[name])} in a parameter group is no argument: did you mean {meant[0]}? A key "
                    "of your own may have any name that is less like one"
                )

    def validate_together(self, groups: Sequence[Group]) -> None:
        """Check that the groups of one optimizer agree where they must.

        Raises:
            ValueError: two groups differ in an argument that belongs to the whole optimizer.
        """
        self._agree(groups, self.wide, "of the whole optimizer: give all groups the same value")

    @staticmethod
    def _agree(groups: Sequence[Group], names: Sequence[str], why: str) -> None:
        for name in names:
            for index, group in enumerate(groups[1:], start=1):
                if group[name] != groups[0][name]:
                    raise ValueError(
                        f"{name} is {groups[0][name]!r} in group 0 and {group[name]!r} in group {index}, but it is a "
                        f"property {why}"
                    )

    def validate_step(self, groups: Sequence[Group]) -> None:
        """Check what a schedule may have written since the last step, before this one changes anything.

        Raises:
            ValueError: arguments that do not go together.
        """
        return

    def refuse_foreign(self, group: Mapping[str, Any], where: str) -> None:
        """Refuse a group of a checkpoint that another optimizer has made.

        Raises:
            ValueError: the message says what it lacks.
        """
        told = ("k", *{"d"}.intersection(self.numbers), *self.arguments)
        missing = next((name for name in told if name not in group and name not in self.younger), None)
        if missing is not None:
            found = ", and d0= the d that was found" if "d" in self.numbers else ""
            raise ValueError(
                f"{where} has no {missing!r}: it was not made by {self.name}, and the state of another class means "
                f"something else; go on from the weights (docs/moving.md): a new {self.name} on them{found}"
            )
