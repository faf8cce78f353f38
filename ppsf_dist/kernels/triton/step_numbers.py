"""The numbers of groups by Triton: one kernel at the beginning of a step and one at its end.

As in C++ (``ppsf_dist/kernels/cpu/numbers.py``) the formulas are those of the class that each derives from, which is
the truth that tests compare them with.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppsf_dist.kernels.codes import KNOWN, TRAITS
from ppsf_dist.kernels.interface import Scales
from ppsf_dist.kernels.triton import numbers
from ppsf_dist.kernels.triton.launching import run
from ppsf_dist.methods.base import Cause, StepNumbers, Total
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS, ProdigyPlusNumbers
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


class On(NamedTuple):
    """What there is to do for some group.

    Attributes:
        pooled: one d serves all, with the arguments of the first.
        takes_mean: steps take the harmonic mean of every d.
        averages_d: it is computed.
        quirks: ``reference_quirks``.
        corrects: ``use_bias_correction``.
        speed: ``use_speed``.
    """

    pooled: bool
    takes_mean: bool
    averages_d: bool
    quirks: bool
    corrects: bool
    speed: bool


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
def rows_of(was: tuple[str, ...]) -> RowsOfNumbers:
    """Where everything stands, where the numbers of groups are these."""
    return RowsOfNumbers(
        given=places("given", PRODIGY_PLUS.hyper),
        was=places("was", was),
        known=places("known", KNOWN),
        coefficients=places("coefficients", PRODIGY_PLUS.coefficients),
        total=places("total", [total.name for total in Total]),
        cause=places("cause", [cause.name for cause in Cause]),
        stat=places("stat", [stat.name for stat in Stat]),
        memory=places("memory", PARAMETER_NUMBERS),
        scale=places("scale", Scales._fields),
        # As ppsf_dist.engine.reductions.Outcome, which this room does not know; tests hold it.
        outcome=places("outcome", ("failed", "replans", "unsound")),
        trait=places("trait", TRAITS, [1 << bit for bit in range(len(TRAITS))]),
    )


class TritonProdigyPlusNumbers(ProdigyPlusNumbers):
    """The numbers of one step of ProdigyPlusScheduleFree, on an accelerator.

    Attributes:
        tables: of the groups, for this step.
        on, rows: what kernels are compiled for.
    """

    backend = "triton"

    def _begin(self) -> None:
        numbers_, first, count = self._numbers, self._groups[0], len(self._groups)
        device = numbers_.values.device
        known = torch.empty(len(KNOWN), count, dtype=torch.float64, device=device)
        self._table = torch.empty(len(PRODIGY_PLUS.coefficients), count, dtype=torch.float32, device=device)
        self.tables = Groups(numbers_.values, numbers_.hyper_table, known, self._table)
        self.on = On(
            pooled=not first["split_groups"],
            takes_mean=first["split_groups_mean"],
            averages_d=first["split_groups"] and first["split_groups_mean"],
            quirks=first["reference_quirks"],
            corrects=self._any("use_bias_correction"),
            speed=self._any("use_speed"),
        )
        self.rows = rows_of(numbers_.rows)
        run(
            numbers.begin_step, 1, self.tables, count, ON=self.on, AT=self.rows, ARGUMENTS=len(PRODIGY_PLUS.hyper),
            BLOCK=GROUPS_AT_ONCE,
        )  # fmt: skip
        rows = known.unbind()
        self.k, self.d, self.delta, self.c, self.q, self.beta2, self._weight, self._weight_sum, adapts, unsound = rows
        self.unsound = unsound[0]
        if self._any("prodigy_steps"):
            self.adapts = adapts > 0

    def _numbers_after(self, totals: Tensor) -> Tensor:
        after = torch.empty_like(self._numbers.values)
        arguments = totals.contiguous(), after, len(self._groups)
        run(numbers.end_step, 1, self.tables, *arguments, ON=self.on, AT=self.rows, BLOCK=GROUPS_AT_ONCE)
        return after


TRITON_NUMBERS: Mapping[type[StepNumbers], type[StepNumbers]] = {ProdigyPlusNumbers: TritonProdigyPlusNumbers}
"""What computes the numbers of a step by Triton, by what computes them with torch."""
