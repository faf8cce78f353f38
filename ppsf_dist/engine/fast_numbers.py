"""The numbers of parameters by what computes those of their groups: C++, Triton, or torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ppsf_dist.engine.native_numbers import NativePartNumbers, NumbersTable
from ppsf_dist.engine.part_numbers import PartNumbers, Traits
from ppsf_dist.engine.reductions import Reductions
from ppsf_dist.kernels.interface import Buffers
from ppsf_dist.methods.base import StepNumbers


class _Fast(NamedTuple):
    """The class, and what its kernels are told once."""

    numbers: Callable[..., PartNumbers]
    told: Callable[[Tensor, Traits, Buffers, Reductions], Any]


def _fast(backend: str) -> _Fast | None:
    if backend == "native":
        return _Fast(NativePartNumbers, NumbersTable)
    if backend == "triton":
        # Imports Triton.
        from ppsf_dist.engine.triton_numbers import OfParameters, TritonPartNumbers

        return _Fast(TritonPartNumbers, OfParameters.table)
    return None


class NumbersOfParameters:
    """Makes the numbers of the parameters of a plan, for each step.

    Args:
        parameters, traits, buffers: as of ``PartNumbers``.
        reductions: where the sums of all ranks are.
    """

    def __init__(self, parameters: Tensor, traits: Traits, buffers: Buffers, reductions: Reductions) -> None:
        self._of, self._reductions = (parameters, traits, buffers), reductions
        self._told: dict[str, Any] = {}

    def of_step(self, step: StepNumbers) -> PartNumbers:
        """By what computes those of its groups, if that knows all that these parameters need."""
        _, traits, _ = self._of
        fast = _fast(step.backend) if traits.are_common else None
        if fast is None:
            return PartNumbers(step, *self._of)
        if step.backend not in self._told:
            self._told[step.backend] = fast.told(*self._of, self._reductions)
        return fast.numbers(step, *self._of, self._told[step.backend])
