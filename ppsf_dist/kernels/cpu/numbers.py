"""The numbers of groups in C++: one call at the beginning of a step and one at its end, in place of many operators.

The formulas are those of the class that each derives from, which is the truth that tests compare them with.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref

import torch
from torch import Tensor

from ppsf_dist.kernels.codes import KNOWN
from ppsf_dist.kernels.cpu.library import load
from ppsf_dist.kernels.cpu.tables import GroupsTable
from ppsf_dist.methods.base import StepNumbers
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS, ProdigyPlusNumbers


class NativeProdigyPlusNumbers(ProdigyPlusNumbers):
    """The numbers of one step of ProdigyPlusScheduleFree, for groups on a CPU.

    Attributes:
        groups: what C++ is told of them, for this step.
    """

    backend = "native"

    def _begin(self) -> None:
        numbers, first, count = self._numbers, self._groups[0], len(self._groups)
        self._known = torch.empty(len(KNOWN), count, dtype=torch.float64)
        self._table = torch.empty(len(PRODIGY_PLUS.coefficients), count, dtype=torch.float32)
        self.groups = GroupsTable(
            count=count,
            pooled=not first["split_groups"],
            takes_mean=first["split_groups_mean"],
            averages_d=first["split_groups"] and first["split_groups_mean"],
            quirks=first["reference_quirks"],
            values=numbers.values.data_ptr(),
            arguments=numbers.hyper_table.data_ptr(),
            known=self._known.data_ptr(),
            coefficients=self._table.data_ptr(),
        )
        load().begin_step(byref(self.groups))
        rows = self._known.unbind()
        self.k, self.d, self.delta, self.c, self.q, self.beta2, self._weight, self._weight_sum, adapts, unsound = rows
        self.unsound = unsound[0]
        if self._any("prodigy_steps"):
            self.adapts = adapts > 0

    def _numbers_after(self, totals: Tensor) -> Tensor:
        after, totals = torch.empty_like(self._numbers.values), totals.contiguous()
        load().end_step(byref(self.groups), totals.data_ptr(), after.data_ptr())
        return after


NATIVE_NUMBERS: Mapping[type[StepNumbers], type[StepNumbers]] = {ProdigyPlusNumbers: NativeProdigyPlusNumbers}
"""What computes the numbers of a step natively, by what computes them with torch."""
