"""Which backend computes which shard: C++ or Triton where there is one, eager kernels elsewhere."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ppsf_dist.kernels.cpu import library
from ppsf_dist.kernels.cpu.backend import NativeKernels
from ppsf_dist.kernels.cpu.numbers import NATIVE_NUMBERS
from ppsf_dist.kernels.cpu.source import Unavailable
from ppsf_dist.kernels.eager import EagerKernels
from ppsf_dist.kernels.interface import Buffers, Kernels, KnownGates, Passes
from ppsf_dist.kernels.numbers import FAST_NUMBERS
from ppsf_dist.kernels.pieces import why_not
from ppsf_dist.kernels.triton import available
from ppsf_dist.methods.base import Group, GroupTable, Method, StepNumbers
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Shard
from ppsf_dist.state.moments import FactoredMoments
from ppsf_dist.state.writes import Writes

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

CHOICES = ("auto", "eager", "native", "triton")
VARIABLE = "PPSF_KERNELS"


@dataclass(frozen=True)
class Use:
    """What one backend computes.

    Attributes:
        backend: "native" (C++), "triton" or "eager".
        why: of eager kernels, why they are no others.
        parameters, elements: how much of this rank's shards.
        kept: bytes that the backend keeps from step to step, beside the optimizer's state.
    """

    backend: str
    why: str
    parameters: int
    elements: int
    kept: int

    def together(self, other: Use) -> Use:
        """Both, of two plans."""
        return replace(
            self,
            parameters=self.parameters + other.parameters,
            elements=self.elements + other.elements,
            kept=self.kept + other.kept,
        )

    def __str__(self) -> str:
        more = "; ".join(
            [
                *([self.why] if self.why else []),
                *([f"{self.kept / 2**20:.1f} MB beside the state"] if self.kept else []),
            ]
        )
        return f"{self.backend}: {self.parameters:,} parameters, {self.elements:,} elements{more and f' ({more})'}"


class Fast(NamedTuple):
    """Kernels that are not eager: their name, and why there are none."""

    name: str
    kernels: Kernels | None
    why: str


class ChosenKernels:
    """Implements ``ppsf_dist.kernels.interface.Kernels`` by the backends that there are.

    Raises:
        ValueError: the environment variable ``PPSF_KERNELS`` is none of its choices.
    """

    def __init__(self) -> None:
        self._choice = os.environ.get(VARIABLE) or "auto"
        if self._choice not in CHOICES:
            raise ValueError(f"{VARIABLE}={self._choice!r} in the environment must be one of {', '.join(CHOICES)}")
        self._eager = EagerKernels()
        self._told: set[str] = set()

    def arithmetic(self, device: torch.device) -> str:
        """What decides the last bit of a weight: ranks that hold copies must have the same."""
        fast = self._fast(device)
        if fast.kernels is None or fast.name != "native":
            return fast.name
        return "native" if library.load().fuses else "native without FMA"

    def _fast(self, device: torch.device) -> Fast:
        """The kernels that are not eager, if there are some for a device."""
        if self._choice == "eager":
            return Fast("eager", None, f"{VARIABLE}=eager")
        if device.type == "meta" or (device.type != "cpu" and self._choice == "auto"):
            # What the last version of them writes was not compared on a GPU: who wants them says so.
            hint = "" if device.type == "meta" else f", where {VARIABLE}=native asks for Triton"
            return Fast("eager", None, f"device {device.type}{hint}")
        try:
            if device.type == "cpu" and self._choice != "triton":
                return Fast("native", NativeKernels(library.load()), "")
            return Fast("triton", available.load(device), "")
        except Unavailable as error:
            if self._choice != "auto":
                raise RuntimeError(
                    f"{VARIABLE}={self._choice}, but there are no {self._choice} kernels: {error}"
                ) from error
            return Fast("eager", None, str(error))

    def step_numbers(
        self, method: Method, groups: Sequence[Group], device: torch.device, *, host_reads: bool
    ) -> Callable[[GroupTable, Sequence[Group], int], StepNumbers]:
        """What computes the numbers of a step: as ``arithmetic``, all ranks have the same.

        Args:
            host_reads: whether the host may read them at once: then C++ may compute them, and else Triton.
        """
        of_torch = method.step_numbers
        by_kernels, kernels = FAST_NUMBERS.get(of_torch), self._fast(device).name
        if by_kernels is None or not by_kernels.computes(groups):
            return of_torch
        if kernels == "native" and host_reads:
            return partial(by_kernels, kernels=NATIVE_NUMBERS, method=method)
        if kernels == "triton" and not host_reads:
            return partial(by_kernels, kernels=available.numbers(), method=method)
        return of_torch

    def prepare(
        self,
        shards: Sequence[Shard],
        slots: Sequence[int],
        switches: Sequence[Switches],
        moments: FactoredMoments,
        state: Mapping[Tensor, Mapping[str, Any]],
        buffers: Buffers,
        portions: Sequence[int] = (0,),
    ) -> ChosenPasses:
        """As of a backend.

        Args:
            portions: the first slot of each part of them that has a pass 1 of its own.
        """
        fast = self._fast(buffers.sums.device)
        missing = fast.why
        reasons = [
            missing or why_not(shard, switch, state[shard.param]) or ""
            for shard, switch in zip(shards, switches, strict=True)
        ]
        chosen: list[tuple[Kernels | None, list[int]]] = [
            (fast.kernels, [row for row, why in enumerate(reasons) if not why]),
            (self._eager, [row for row, why in enumerate(reasons) if why]),
        ]
        parts: list[ChosenPart] = []
        for portion, (first, end) in enumerate(pairwise((*portions, len(moments.placed)))):
            for kernels, rows in chosen:
                here = [row for row in rows if first <= slots[row] < end]
                if kernels is not None and here:
                    of_rows = _of_rows(shards, here), _of_rows(slots, here), _of_rows(switches, here)
                    parts.append(ChosenPart(kernels.prepare(*of_rows, moments, state, buffers), here, portion))
        uses = _uses(shards, reasons, fast.name, kept=sum(part.passes.kept for part in parts))
        self._tell(uses, missing if buffers.sums.device.type == "cpu" and self._choice != "eager" else "")
        again = partial(self.prepare, shards, slots, switches, moments, state, buffers, portions)
        return ChosenPasses(parts, len(portions), uses, again)

    def _tell(self, uses: Sequence[Use], missing: str) -> None:
        """Say once for each reason that something is not native."""
        for use in uses:
            if use.why and use.why not in self._told:
                self._told.add(use.why)
                # That a machine has none is worth more than that a switch needs others.
                logger.log(logging.WARNING if use.why == missing else logging.INFO, "kernels: %s", use)


def _uses(shards: Sequence[Shard], reasons: Sequence[str], fast: str, *, kept: int) -> tuple[Use, ...]:
    parameters, elements = Counter(reasons), Counter[str]()
    for shard, why in zip(shards, reasons, strict=True):
        elements[why] += shard.numel
    return tuple(
        Use("eager" if why else fast, why, parameters[why], elements[why], 0 if why else kept)
        for why in sorted(parameters)
    )


def _of_rows(of: Sequence[_T], rows: Sequence[int]) -> Sequence[_T]:
    """What belongs to some rows, which are in order; where that is all, nothing is copied in every step."""
    return of if len(rows) == len(of) else [of[row] for row in rows]


class ChosenPart(NamedTuple):
    """Passes of one backend, which of all shards are theirs, and the portion that these are in."""

    passes: Passes
    rows: Sequence[int]
    portion: int


class ChosenPasses:
    """The passes of ``ppsf_dist.kernels.interface.Passes`` over everything in a plan, by several backends.

    Args:
        parts: what belongs to no shard is done by the first.
        portions: how many parts pass 1 has.
        uses: what they compute.
        choose: prepares anew.
    """

    def __init__(
        self,
        parts: Sequence[ChosenPart],
        portions: int,
        uses: tuple[Use, ...],
        choose: Callable[[], ChosenPasses],
    ) -> None:
        self.parts, self.portions, self.uses, self._choose = parts, portions, uses, choose
        self._first = parts[0].passes

    @property
    def backends(self) -> set[str]:
        """Names of those that compute it."""
        return {use.backend for use in self.uses}

    @property
    def kept(self) -> int:
        return sum(part.passes.kept for part in self.parts)

    def fits(self, weights: Sequence[Tensor]) -> bool:
        return all(passes.fits(_of_rows(weights, rows)) for passes, rows, _ in self.parts)

    def bind(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        if not self.fits(weights):
            again = self._choose()
            self.parts, self.uses, self._first = again.parts, again.uses, again._first
        for passes, rows, _ in self.parts:
            passes.bind(_of_rows(weights, rows), _of_rows(gradients, rows))

    def release(self) -> None:
        for passes, _, _ in self.parts:
            passes.release()

    def pass_1(self, portion: int, *, goes_on: bool) -> None:
        for part in self.parts:
            if part.portion == portion:
                part.passes.pass_1(goes_on=goes_on)

    def update_moments(self) -> None:
        self._first.update_moments()

    def fill_factors(self) -> None:
        self._first.fill_factors()

    def pass_2(self) -> None:
        for passes, _, _ in self.parts:
            passes.pass_2()

    def count_masks(self) -> None:
        for passes, _, _ in self.parts:
            passes.count_masks()

    def write_moments(self, writes: Writes) -> None:
        self._first.write_moments(writes)

    def pass_3(self, known: KnownGates | None, writes: Writes) -> None:
        for passes, _, _ in self.parts:
            passes.pass_3(known, writes)
