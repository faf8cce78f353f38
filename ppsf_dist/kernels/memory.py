"""Where the tensors of shards lie, for kernels that read and write by address.

Addresses are looked up in every step, because a framework may have moved what lies there.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppsf_dist.kernels.codes import ADDRESSES
from ppsf_dist.kernels.pieces import FLOATS, LIKE_WEIGHTS, SAMPLES
from ppsf_dist.methods.switches import Switches
from ppsf_dist.sharding import Shard
from ppsf_dist.state.inventory import needed

State = Mapping[Tensor, Mapping[str, Any]]


class Memory:
    """The tensors of a plan's shards and the table of their addresses.

    Args:
        shards, switches, state: as a backend's ``prepare`` is given them.

    Attributes:
        table: a row for each shard, by ``ppsf_dist.kernels.codes.ADDRESSES``; 0 where something is not there.
        weights: of this step.
        packed: of each shard the samples of z, one after the other, where it has some.
    """

    def __init__(self, shards: Sequence[Shard], switches: Sequence[Switches], state: State) -> None:
        states = [
            {entry.name: state[shard.param].get(entry.name) for entry in needed(switch, shard.shape)}
            for shard, switch in zip(shards, switches, strict=True)
        ]
        self._dtypes = [shard.weights().dtype for shard in shards]
        # An empty tensor lies at address 0.
        device = shards[0].weights().device
        self._nothing = {dtype: torch.empty(0, dtype=dtype, device=device) for dtype in FLOATS}
        self.table = array("q", bytes(8 * len(ADDRESSES) * len(shards)))
        self._known: dict[str, list[int]] = {}
        self.weights: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._state: dict[str, list[Tensor]] = {}
        for name in (*LIKE_WEIGHTS, *SAMPLES):
            if any(of.get(name) is not None for of in states):
                self._state[name] = [self._present(of.get(name)) for of in states]
        self.packed = [
            torch.empty_like(p0, dtype=z.dtype) if z is not None and p0 is not None else None
            for z, p0 in ((of.get("z"), of.get("p0")) for of in states)
        ]
        # These never move.
        self._look_up("packed z", [self._present(packed) for packed in self.packed])
        self._of_z = [z for of in states if (z := of.get("z")) is not None]
        self._written: list[int] | None = None

    def _present(self, tensor: Tensor | None) -> Tensor:
        return self._nothing[torch.float32] if tensor is None else tensor

    def bind(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take this step's tensors and look up where they are."""
        self.weights = list(weights)
        # Held: whoever drops one in the middle of a step does not free what the passes read.
        here = [gradient for gradient in gradients if gradient is not None]
        if len(here) < len(gradients):
            here = [self._nothing[d] if g is None else g for g, d in zip(gradients, self._dtypes, strict=True)]
        self._gradients = here
        if not all(map(Tensor.is_contiguous, self._gradients)) or [g.dtype for g in self._gradients] != self._dtypes:
            pairs = zip(self._gradients, self._dtypes, strict=True)
            self._gradients = [gradient.to(dtype).contiguous() for gradient, dtype in pairs]
        for name, tensors in {"weights": self.weights, "gradient": self._gradients, **self._state}.items():
            self._look_up(name, tensors)

    def _look_up(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Where a tensor of each shard lies now: most often where it has lain before."""
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses != self._known.get(name):
            self.table[ADDRESSES.index(name) :: len(ADDRESSES)] = array("q", addresses)
            self._known[name] = addresses

    def release(self) -> None:
        """Let go of the gradients."""
        self._gradients = []

    def z_was_written(self) -> bool:
        """Whether anybody but the kernels has written to a z, as far as torch knows, since this was asked last."""
        written = [z._version for z in self._of_z]
        changed, self._written = written != self._written, written
        return changed
