"""The numbers of the parameters of a part by Triton: each method is one kernel. Imports Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ppsf_dist.algorithm import rounding
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.part_numbers import Contribution, PartNumbers, Traits, Verdict
from ppsf_dist.engine.reductions import Reductions
from ppsf_dist.kernels.interface import Buffers, KnownGates
from ppsf_dist.kernels.numbers import FastNumbers
from ppsf_dist.kernels.triton import numbers_of_parameters as kernels
from ppsf_dist.kernels.triton.launching import run
from ppsf_dist.methods.base import Total
from ppsf_dist.state.moments import FactoredMoments

AT_ONCE = 128
"""Parameters of a program."""


class OfParameters(NamedTuple):
    """What kernels are told of the parameters of a plan, once: tensors on the device, most as of ``Buffers``.

    Attributes:
        traits: bits of each, by ``ppsf_dist.kernels.codes.TRAITS``.
        numbers: that parameters keep.
        outcome: what ranks have said.
    """

    traits: Tensor
    group_of: Tensor
    param_id: Tensor
    numel: Tensor
    numbers: Tensor
    coefficients: Tensor
    scales: Tensor
    keys: Tensor
    moments_gate: Tensor
    weights_gate: Tensor
    stats: Tensor
    outcome: Tensor

    @classmethod
    def table(cls, parameters: Tensor, traits: Traits, buffers: Buffers, reductions: Reductions) -> OfParameters:
        """As of ``ppsf_dist.engine.native_numbers.NumbersTable``."""
        return cls(
            traits=traits.as_bits(),
            group_of=traits.group_of,
            param_id=traits.param_id,
            numel=traits.numel,
            numbers=parameters,
            coefficients=buffers.coefficients.table,
            scales=buffers.scales,
            keys=buffers.keys,
            moments_gate=buffers.gates.moments.view(torch.uint8),
            weights_gate=buffers.gates.weights.view(torch.uint8),
            stats=buffers.stats,
            outcome=reductions.last.outcome,
        )


class TritonPartNumbers(PartNumbers):
    """The numbers of one step of the parameters of one part, on an accelerator. No ADOPT, no FOCUS and no OrthoGrad.

    Args:
        step: those of the groups.
        parameters, traits, buffers: as of ``PartNumbers``.
        of: the same for kernels.
    """

    def __init__(
        self,
        step: FastNumbers,
        parameters: Tensor,
        traits: Traits,
        buffers: Buffers,
        of: OfParameters,
    ) -> None:
        super().__init__(step, parameters, traits, buffers)
        self._groups, self._on, self._at, self._group_count = step.told
        self._of, self._count = of, len(of.traits)
        self._programs, self._columns = triton.cdiv(self._count, AT_ONCE), of.stats.shape[1]

    def begin(self, moments: FactoredMoments) -> None:
        self.fill_coefficients()
        if self._traits.any_random:
            seed = rounding.folded(self._step.seed)
            run(kernels.fill_keys, self._programs, self._of, seed, self._count, AT=self._at, BLOCK=AT_ONCE)

    def fill_coefficients(self) -> None:
        run(
            kernels.fill_coefficients, self._programs, self._groups, self._of, self._group_count, self._count,
            ROWS=len(self._of.coefficients), BLOCK=AT_ONCE,
        )  # fmt: skip

    def fill_scales(self, stats: Tensor) -> None:
        run(
            kernels.fill_scales, self._programs, self._groups, self._of, self._group_count, self._count, AT=self._at,
            COLUMNS=self._columns, BLOCK=AT_ONCE,
        )  # fmt: skip

    def verdict(self, reductions: Reductions, host: HostAccess) -> Verdict:
        device = self._of.traits.device
        active = torch.empty(self._count, dtype=torch.bool, device=device)
        cause = torch.empty((), dtype=torch.float64, device=device)
        squares = reductions.sums.sum(dtype=torch.float64)
        run(
            kernels.find_cause, 1, self._groups, self._of, squares, active.view(torch.uint8), cause, self._group_count,
            self._count, AT=self._at, COLUMNS=self._columns, BLOCK=AT_ONCE,
        )  # fmt: skip
        return Verdict(active, cause, None)

    def contribution(self, stats: Tensor, verdict: Verdict) -> Contribution:
        totals = torch.empty(len(Total), self._group_count, dtype=torch.float64, device=self._of.traits.device)
        after = torch.empty_like(self._parameters)
        run(
            kernels.contribute, self._group_count, self._groups, self._of, verdict.active.view(torch.uint8),
            verdict.cause, totals, after, self._group_count, self._count, ON=self._on, AT=self._at,
            COLUMNS=self._columns, BLOCK=AT_ONCE,
        )  # fmt: skip
        return Contribution(totals, after)

    def fill_gates(self, verdict: Verdict, host: HostAccess) -> KnownGates | None:
        active = verdict.active.view(torch.uint8)
        run(
            kernels.fill_gates, self._programs, self._groups, self._of, active, verdict.cause, self._group_count,
            self._count, AT=self._at, BLOCK=AT_ONCE,
        )  # fmt: skip
        return None
