"""The numbers of groups by Triton: one kernel at the beginning of a step and one at its end. Imports Triton."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from ppsf_dist.kernels.codes import KNOWN, TRAITS
from ppsf_dist.kernels.interface import Scales
from ppsf_dist.kernels.numbers import FastNumbers, NumbersKernels, Options
from ppsf_dist.kernels.triton.launching import run
from ppsf_dist.kernels.triton.numbers_of_prodigy import begin_prodigy, end_prodigy, learn_prodigy
from ppsf_dist.kernels.triton.numbers_of_prodigy_plus import begin_prodigy_plus, end_prodigy_plus
from ppsf_dist.kernels.triton.numbers_of_schedulefree import begin_schedulefree, end_schedulefree
from ppsf_dist.methods.base import Cause, Total
from ppsf_dist.methods.sums import Stat
from ppsf_dist.state.inventory import PARAMETER_NUMBERS

GROUPS_AT_ONCE = 32


class Groups(NamedTuple):
    """The tables of groups, rows by groups, as tensors on the device.

    Attributes:
        was: the numbers before the step, fp64.
        given: the arguments, fp64, by ``ppsf_dist.methods.base.Method.hyper``.
        known: what a step knows, fp64, by ``KNOWN``.
        coefficients: fp32.
    """

    was: Tensor
    given: Tensor
    known: Tensor
    coefficients: Tensor


class RowsOfNumbers(NamedTuple):
    """Where everything stands in its table, by name."""

    given: Any
    was: Any
    known: Any
    coefficients: Any
    total: Any
    cause: Any
    stat: Any
    memory: Any
    scale: Any
    outcome: Any
    trait: Any


def places(table: str, rows: Sequence[str], numbers_: Sequence[int] | None = None) -> Any:
    """Rows of a table by name, numbered from 0 on unless they have numbers of their own."""
    named = namedtuple(table, [name.lower() for name in rows])  # type: ignore[misc]
    return named(*(range(len(rows)) if numbers_ is None else numbers_))


@cache
def rows_of(
    given: tuple[str, ...], was: tuple[str, ...], own: tuple[str, ...], coefficients: tuple[str, ...]
) -> RowsOfNumbers:
    """Where everything stands, where the arguments of groups, their numbers, and so on, are these."""
    return RowsOfNumbers(
        given=places("given", given),
        was=places("was", was),
        known=places("known", [*KNOWN, *[name.lstrip("_") for name in own]]),
        coefficients=places("coefficients", coefficients),
        total=places("total", [total.name for total in Total]),
        cause=places("cause", [cause.name for cause in Cause]),
        stat=places("stat", [stat.name for stat in Stat]),
        memory=places("memory", PARAMETER_NUMBERS),
        scale=places("scale", Scales._fields),
        # As ppsf_dist.engine.reductions.Outcome, which this room does not know; tests hold it.
        outcome=places("outcome", ("failed", "replans", "unsound")),
        trait=places("trait", TRAITS, [1 << bit for bit in range(len(TRAITS))]),
    )


class Told(NamedTuple):
    """What kernels are told of the groups for one step.

    Attributes:
        tables: of the groups.
        on: what there is to do.
        rows: where everything stands.
        group_count: how many groups there are.
    """

    tables: Groups
    on: Options
    rows: RowsOfNumbers
    group_count: int


BEGIN = {"prodigy_plus": begin_prodigy_plus, "prodigy": begin_prodigy, "schedulefree": begin_schedulefree}
END = {"prodigy_plus": end_prodigy_plus, "prodigy": end_prodigy, "schedulefree": end_schedulefree}


class TritonNumbers:
    """Implements ``ppsf_dist.kernels.numbers.NumbersKernels``, for groups on an accelerator: a kernel for each."""

    name = "triton"

    def begin(self, step: FastNumbers) -> Told:
        numbers, method = step.numbers, step.method
        told = Told(
            Groups(numbers.values, numbers.hyper_table, step.known, step.coefficients_table),
            step.options,
            rows_of(method.hyper, numbers.rows, step.own, method.coefficients),
            numbers.values.shape[1],
        )
        adaptive = {} if step.kind == "prodigy_plus" else {"ADAPTIVE": len(numbers.adaptive)}
        self._run(BEGIN[step.kind], told, ARGUMENTS=len(method.hyper), **adaptive)
        return told

    def learn(self, step: FastNumbers, totals: Tensor) -> None:
        self._run(learn_prodigy, step.told, totals)

    def end(self, step: FastNumbers, totals: Tensor, after: Tensor) -> None:
        self._run(END[step.kind], step.told, totals, after)

    def _run(self, kernel: Any, told: Told, *tensors: Tensor, **constants: int) -> None:
        options = {"ON": told.on, "AT": told.rows, "BLOCK": GROUPS_AT_ONCE, **constants}
        run(kernel, 1, told.tables, *tensors, told.group_count, **options)


TRITON_NUMBERS: NumbersKernels = TritonNumbers()
