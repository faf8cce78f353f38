"""The numbers of the parameters of a part in C++, where those of its groups are: each method is one call."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ppsf_dist.algorithm import rounding
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.part_numbers import Contribution, Known, PartNumbers, Traits, Verdict
from ppsf_dist.engine.reductions import Reductions
from ppsf_dist.kernels.cpu.library import load
from ppsf_dist.kernels.cpu.tables import ParametersTable
from ppsf_dist.kernels.interface import Buffers, KnownGates
from ppsf_dist.kernels.numbers import FastNumbers
from ppsf_dist.methods.base import Total
from ppsf_dist.state.moments import FactoredMoments


class NumbersTable:
    """What C++ is told of the parameters of a plan, once.

    Args:
        parameters: the numbers that parameters keep.
        traits: of the parameters.
        buffers: where the passes read and write.
        reductions: where the sums of all ranks are.
    """

    def __init__(self, parameters: Tensor, traits: Traits, buffers: Buffers, reductions: Reductions) -> None:
        bits = traits.as_bits()
        self.outcome = reductions.last.outcome
        # The tensors live as long as the table.
        self._held = (bits, parameters, traits, buffers, reductions)
        self.table = ParametersTable(
            count=len(bits),
            columns=buffers.stats.shape[1],
            sums_count=buffers.sums.numel(),
            traits=bits.data_ptr(),
            group_of=traits.group_of.data_ptr(),
            param_id=traits.param_id.data_ptr(),
            numel=traits.numel.data_ptr(),
            numbers=parameters.data_ptr(),
            coefficients=buffers.coefficients.table.data_ptr(),
            scales=buffers.scales.data_ptr(),
            keys=buffers.keys.data_ptr(),
            moments_gate=buffers.gates.moments.data_ptr(),
            weights_gate=buffers.gates.weights.data_ptr(),
            stats=buffers.stats.data_ptr(),
            sums=buffers.sums.data_ptr(),
            outcome=self.outcome.data_ptr(),
        )


class NativePartNumbers(PartNumbers):
    """The numbers of one step of the parameters of one part, on a CPU. No ADOPT, no FOCUS and no OrthoGrad.

    Args:
        step: those of the groups.
        parameters, traits, buffers: as of ``PartNumbers``.
        table: of the same parameters.
    """

    def __init__(
        self,
        step: FastNumbers,
        parameters: Tensor,
        traits: Traits,
        buffers: Buffers,
        table: NumbersTable,
    ) -> None:
        super().__init__(step, parameters, traits, buffers)
        self._library, self._table = load(), table
        self._groups, self._of = byref(step.told), byref(table.table)

    def begin(self, moments: FactoredMoments) -> None:
        self.fill_coefficients()
        if self._traits.any_random:
            self._library.fill_keys(self._of, rounding.folded(self._step.seed))

    def fill_coefficients(self) -> None:
        self._library.fill_coefficients(self._groups, self._of)

    def fill_scales(self, stats: Tensor) -> None:
        self._library.fill_scales(self._groups, self._of)

    def verdict(self, reductions: Reductions, host: HostAccess) -> Verdict:
        active = torch.empty(self._table.table.count, dtype=torch.bool)
        cause = self._library.find_cause(self._groups, self._of, active.data_ptr())
        known = Known(cause, self._table.outcome.tolist())
        return Verdict(active, torch.tensor(float(cause), dtype=torch.float64), known)

    def contribution(self, stats: Tensor, verdict: Verdict) -> Contribution:
        totals = torch.empty(len(Total), len(self._step.k), dtype=torch.float64)
        after = torch.empty_like(self._parameters)
        tensors = verdict.active, verdict.cause, totals, after
        self._library.contribute(self._groups, self._of, *map(Tensor.data_ptr, tensors))
        return Contribution(totals, after)

    def fill_gates(self, verdict: Verdict, host: HostAccess) -> KnownGates | None:
        self._library.fill_gates(self._groups, self._of, verdict.active.data_ptr(), verdict.cause.data_ptr())
        known = self._buffers.gates.moments.tolist()
        return known, known
