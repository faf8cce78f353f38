"""What a backend of kernels is given and what it computes. Every backend implements :class:`Kernels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        table: names by parameters, fp32.
    """

    def __init__(self, names: tuple[str, ...], table: Tensor) -> None:
        self.names, self.table = names, table

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Coefficients:
        """Vectors over parameters (fp64), rounded once."""
        return cls(tuple(named), torch.stack(list(named.values())).float())

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


@dataclass(frozen=True)
class Gates:
    """Which parameters are written, decided on the device.

    Attributes:
        moments: bool vector over parameters: the second moment is updated.
        weights: bool vector: everything else is.
        known: both as lists where the host may read them without waiting (parameters on a CPU), else None.
    """

    moments: Tensor
    weights: Tensor
    known: Sequence[Sequence[bool]] | None


class Passes(Protocol):
    """What a backend has prepared for one plan: the passes over everything in it. 1 and 2 only read; 3 writes.

    Args of the passes: ``stats`` is the table of sums (parameters by :class:`ppsf_dist.methods.sums.Stat`), added to in
    place; ``factors`` is the flat buffer of square roots of the factored moments.
    """

    def bind(self) -> None:
        """Look up this step's weights and gradients, which a framework may have replaced since the last."""

    def release(self) -> None:
        """Let go of the gradients, so that the next backward pass finds their memory free."""

    def pass_1(self, coefficients: Coefficients, factors: Tensor, sums: Tensor, stats: Tensor) -> None:
        """Sums of g^2 by row and column into ``sums`` (flat, fp32), and all sums that need nothing of this step."""

    def pass_2(self, coefficients: Coefficients, factors: Tensor, stats: Tensor) -> None:
        """Norms of the direction and its angle with the weights."""

    def count_masks(self, coefficients: Coefficients, factors: Tensor, scales: Tensor, stats: Tensor) -> None:
        """Size of the mask of the schedule-free cautious update."""

    def pass_3(
        self, coefficients: Coefficients, factors: Tensor, scales: Tensor, gates: Gates, keys: Tensor, writes: Writes
    ) -> None:
        """Write y, z, the elementwise moments and s, through ``writes``: an exception in here is a pause.

        Called again with the same arguments it goes on where the exception has ended it.
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
    ) -> Passes:
        """Once for a plan: how tensors are cut, where they lie, which formulas run on them.

        Args:
            shards: the local shards.
            slots: of each of them its row in the tables of sums and numbers.
            switches: of each of them.
            moments: the factored buffer, which knows the parameters that it holds and the places of their rows.
            state: state tensors of each parameter, laid out like its local weights (``p0`` and ``s``: one value for
                each sample).
        """
