"""The numbers of groups in C++ (``numbers.h``, and ``numbers_of_*.h`` for each method)."""

from __future__ import annotations

from ctypes import byref

from torch import Tensor

from ppsf_dist.kernels.cpu.library import load
from ppsf_dist.kernels.cpu.tables import GroupsTable
from ppsf_dist.kernels.numbers import FastNumbers, NumbersKernels


class NativeNumbers:
    """Implements ``ppsf_dist.kernels.numbers.NumbersKernels``, for groups on a CPU."""

    name = "native"

    def begin(self, step: FastNumbers) -> GroupsTable:
        numbers, method = step.numbers, step.method
        told = GroupsTable(
            count=numbers.values.shape[1],
            arguments_count=len(method.hyper),
            adaptive=len(numbers.adaptive),
            k=numbers.rows.index("k"),
            skipped_steps=numbers.rows.index("skipped_steps"),
            coefficients_count=len(method.coefficients),
            options=step.options.as_bits(),
            values=numbers.values.data_ptr(),
            arguments=numbers.hyper_table.data_ptr(),
            known=step.known.data_ptr(),
            coefficients=step.coefficients_table.data_ptr(),
        )
        load().begin[step.kind](byref(told))
        return told

    def learn(self, step: FastNumbers, totals: Tensor) -> None:
        load().learn[step.kind](byref(step.told), totals.data_ptr())

    def end(self, step: FastNumbers, totals: Tensor, after: Tensor) -> None:
        load().end[step.kind](byref(step.told), totals.data_ptr(), after.data_ptr())


NATIVE_NUMBERS: NumbersKernels = NativeNumbers()
