"""What a backend of kernels is given and what it computes. Every backend implements ``Kernels``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Shard
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.writes import Writes


class Coefficients:
    """Numbers that scale the formulas, by the names that the method gives them: fp32 vectors over parameters.

    Args:
        names: of the rows.
        slots: number of parameters.
        device: of the table.
    """

    def __init__(self, names: Iterable[str], slots: int, device: torch.device) -> None:
        self.names = tuple(names)
        self.table = torch.zeros(len(self.names), slots, dtype=torch.float32, device=device)

    def fill(self, by_group: Tensor, group_of: Tensor) -> None:
        """Write the rows of all names, numbers of groups (fp32), for the parameters of each."""
        torch.index_select(by_group, 1, group_of, out=self.table)

    def __getitem__(self, name: str) -> Tensor:
        return self.table[self.names.index(name)]


class Scales(NamedTuple):
    """Numbers that follow from this step's sums, one for each parameter: fp32 vectors over parameters.

    The finished direction is ``amount * u - pull * w``.
    """

    amount: Tensor
    pull: Tensor
    mask: Tensor
    advance: Tensor
    """``amount * delta``"""


class Gates(NamedTuple):
    """Which parameters are written, decided on the device: bool vectors over parameters."""

    moments: Tensor
    """The second moment is updated."""
    weights: Tensor
    """Everything else is."""


KnownGates = tuple[Sequence[bool], Sequence[bool]]
"""Both as lists, where the host may read them without waiting (parameters on a CPU)."""


@dataclass(frozen=True)
class Buffers:
    """What the passes share with the engine: tensors that live as long as the plan, written in place, never rebound.

    Attributes:
        coefficients: numbers of the step that scale the formulas.
        factors: square roots of the factored moments, flat, fp32.
        new_moments: the factored moments after the step, until they are written.
        adopt: which parameters ADOPT steps, a bool vector over them: they are divided by the moments before the step.
            None where it steps none.
        scales: the table of ``Scales``, fp32.
        keys: of stochastic rounding, int32 vector over parameters.
        gates: what pass 3 writes.
        sums: sums of g^2 by row and column, flat, fp32; added to by pass 1.
        stats: the table of sums, parameters by ``ppsf_dist.methods.sums.Stat``, fp64; added to by passes 1 and 2.
        masks: another one, added to by ``count_masks``; None where no switch asks for it.
    """

    coefficients: Coefficients
    factors: Tensor
    new_moments: Tensor
    adopt: Tensor | None
    scales: Tensor
    keys: Tensor
    gates: Gates
    sums: Tensor
    stats: Tensor
    masks: Tensor | None


class Passes(Protocol):
    """What a backend has prepared for one plan: the passes over everything in it. 1 and 2 only read; 3 writes."""

    @property
    def kept(self) -> int:
        """Bytes that are kept from step to step, beside state and buffers."""

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weights of all shards that were prepared lie as they did then."""

    def bind(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take this step's tensors, which a framework may have replaced since the last.

        Args:
            weights: of each shard that was prepared, its local weights, of the same shape and dtype as then.
            gradients: of each of them its local gradient, if it has one.
        """

    def release(self) -> None:
        """Let go of the gradients, so that the next backward pass finds their memory free."""

    def pass_1(self, *, goes_on: bool) -> None:
        """Sums of g^2 by row and column, and all sums that need nothing of this step.

        Args:
            goes_on: whether no other rank adds to the sums, and moments, factors and pass 2 come next: a backend may
                do all that for a parameter while its gradient is in the cache. Then the calls for them do nothing more.
        """

    def update_moments(self) -> None:
        """The factored moments after this step, from the sums of all ranks, into ``new_moments``."""

    def fill_factors(self) -> None:
        """The factors of the denominators, from ``new_moments``."""

    def pass_2(self) -> None:
        """Norms of the direction and its angle with the weights."""

    def count_masks(self) -> None:
        """Size of the mask of the schedule-free cautious update."""

    def write_moments(self, writes: Writes) -> None:
        """``new_moments`` in place of the old ones, of the parameters whose gate is open. As of ``pass_3``."""

    def pass_3(self, known: KnownGates | None, writes: Writes) -> None:
        """Write y, z, the elementwise moments and s, through ``writes``: an exception in here is a pause.

        Called again with the same arguments it goes on where the exception has ended it.

        Args:
            known: the gates, where the host may read them.
            writes: the writes of the step.
        """


class Kernels(Protocol):
    """A backend."""

    def prepare(
        self,
        shards: Sequence[Shard],
        slots: Sequence[int],
        switches: Sequence[Switches],
        moments: FactoredMoments,
        state: Mapping[Tensor, Mapping[str, Any]],
        buffers: Buffers,
    ) -> Passes:
        """Once for a plan: how tensors are cut, where they lie, which formulas run on them.

        Args:
            shards: the local shards.
            slots: of each of them its row in the tables of sums and numbers.
            switches: of each of them.
            moments: the factored buffer, which knows the parameters that it holds and the places of their rows.
            state: state tensors of each parameter, laid out like its local weights (``p0`` and ``s``: one value for
                each sample).
            buffers: what the passes share with the engine.
        """
