"""The numbers of groups by kernels: a call at the beginning of a step and one at its end, in place of many operators.

The formulas are those of the class that each is mixed into, which is the truth that tests compare them with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ppsf_dist.kernels.codes import KNOWN
from ppsf_dist.methods.adamw_schedulefree import AdamWNumbers, RAdamNumbers
from ppsf_dist.methods.base import Group, GroupTable, Method, StepNumbers
from ppsf_dist.methods.prodigy import ProdigyNumbers
from ppsf_dist.methods.prodigy_plus import ProdigyPlusNumbers
from ppsf_dist.methods.schedulefree import ScheduleFreeNumbers

_MOST = 1 << 40
"""Exponents below it are powers by squaring."""


class Options(NamedTuple):
    """What there is to do for some group: bits of a number in C++ (``cpu/numbers.h``), compiled in by Triton.

    Attributes:
        pooled: one d serves all, with the arguments of the first.
        takes_mean: steps take the harmonic mean of every d.
        averages_d: it is computed.
        quirks: ``reference_quirks``.
        corrects: ``use_bias_correction``.
        speed: ``use_speed``.
        adam, radam: there is Adam's second moment, and RAdam's rectification of it.
    """

    pooled: bool = False
    takes_mean: bool = False
    averages_d: bool = False
    quirks: bool = False
    corrects: bool = False
    speed: bool = False
    adam: bool = False
    radam: bool = False

    def as_bits(self) -> int:
        return sum(on << bit for bit, on in enumerate(self))


class NumbersKernels(Protocol):
    """What computes them, and where: C++ or Triton.

    Attributes:
        name: by which the kernels of their parameters are found.
    """

    name: str

    def begin(self, step: FastNumbers) -> Any:
        """Fill what the step knows and its coefficients.

        Returns:
            What the others and the kernels of parameters are told of the groups.
        """

    def learn(self, step: FastNumbers, totals: Tensor) -> None:
        """Take in the sums of all parts."""

    def end(self, step: FastNumbers, totals: Tensor, after: Tensor) -> None:
        """Fill the numbers after the step."""


class FastNumbers(StepNumbers):
    """The numbers of one step by kernels.

    Args:
        kernels: what computes them.
        method: whose they are.

    Attributes:
        numbers: those of all groups.
        kind: which kernels.
        own: what a step knows of a group beyond ``KNOWN``, by the attribute that it is.
        options: what there is to do.
        known: rows by groups.
        coefficients_table: the coefficients by groups, in fp32.
        told: of the groups, for this step.
    """

    kind: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, numbers: GroupTable, groups: Sequence[Group], seed: int, *, kernels: NumbersKernels, method: Method
    ) -> None:
        self.kernels, self.method, self.numbers, self.backend = kernels, method, numbers, kernels.name
        super().__init__(numbers, groups, seed)

    @staticmethod
    def computes(groups: Sequence[Group]) -> bool:
        """Whether kernels know all that these groups ask for."""
        return True

    def _options(self) -> Options:
        return Options()

    def _begin(self) -> None:
        count, device = len(self._groups), self._numbers.values.device
        self.options = self._options()
        self.known = torch.empty(len(KNOWN) + len(self.own), count, dtype=torch.float64, device=device)
        self.coefficients_table = torch.empty(len(self.method.coefficients), count, dtype=torch.float32, device=device)
        self.told = self.kernels.begin(self)
        rows = dict(zip((*KNOWN, *self.own), self.known.unbind(), strict=True))
        self.unsound = rows.pop("unsound")[0]
        for name in ("k", "delta", "c", "q", *self.own):
            setattr(self, name, rows[name])
        self._tell(rows)

    def _tell(self, rows: Mapping[str, Tensor]) -> None:
        """What torch has to know of a step whose parameters it computes."""

    def table(self, names: Sequence[str]) -> Tensor:
        return self.coefficients_table

    def _numbers_after(self, totals: Tensor) -> Tensor:
        after = torch.empty_like(self._numbers.values)
        self.kernels.end(self, totals.contiguous(), after)
        return after


class FastProdigyPlusNumbers(FastNumbers, ProdigyPlusNumbers):
    """Those of ProdigyPlusScheduleFree."""

    kind = "prodigy_plus"
    own = ("d", "beta2", "_weight", "_weight_sum")

    def _options(self) -> Options:
        first = self._groups[0]
        return Options(
            pooled=not first["split_groups"],
            takes_mean=first["split_groups_mean"],
            averages_d=first["split_groups"] and first["split_groups_mean"],
            quirks=first["reference_quirks"],
            corrects=self._any("use_bias_correction"),
            speed=self._any("use_speed"),
        )

    def _tell(self, rows: Mapping[str, Tensor]) -> None:
        if self._any("prodigy_steps"):
            self.adapts = rows["adapts"] > 0


class FastProdigyNumbers(FastNumbers, ProdigyNumbers):
    """Those of Prodigy: its d and what that comes from are known once a step has its sums."""

    kind = "prodigy"
    own = ("d", "d_max", "d_hat", "d_numerator", "d_denom")

    def learn(self, totals: Tensor) -> None:
        self.kernels.learn(self, totals.contiguous())


class FastScheduleFreeNumbers(FastNumbers, ScheduleFreeNumbers):
    """Those of SGDScheduleFree, AdamWScheduleFree and RAdamScheduleFree."""

    kind = "schedulefree"
    own = ("_weight_sum", "_lr_max")

    @staticmethod
    def computes(groups: Sequence[Group]) -> bool:
        """Powers of whole numbers, which is what ``r`` and ``weight_lr_power`` are unless somebody asks for others."""
        exponents = [float(group[name]) for group in groups for name in ("r", "weight_lr_power")]
        return all(exponent.is_integer() and abs(exponent) < _MOST for exponent in exponents)

    def _options(self) -> Options:
        return Options(adam="beta2" in self.method.hyper, radam="silent_sgd_phase" in self.method.hyper)


FAST_NUMBERS: Mapping[type[StepNumbers], type[FastNumbers]] = {
    ProdigyPlusNumbers: FastProdigyPlusNumbers,
    ProdigyNumbers: FastProdigyNumbers,
    ScheduleFreeNumbers: FastScheduleFreeNumbers,
    AdamWNumbers: FastScheduleFreeNumbers,
    RAdamNumbers: FastScheduleFreeNumbers,
}
"""What computes the numbers of a step by kernels, by what computes them with torch."""
