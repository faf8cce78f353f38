"""Numbers between the device and the host, without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostAccess:
    """What the host may read when.

    Attributes:
        free: whether the host may read tensors at once, because they lie in its own memory. Otherwise a read would
            wait for all work that the device still has to do.
        captures: whether what is launched now is recorded, to be run later and again: nothing that only this step
            needs may be in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free = device.type == "cpu"
        self.captures = False

    def upload(self, rows: Sequence[Sequence[float]]) -> Tensor:
        """Numbers as an fp64 tensor on the device."""
        host = torch.tensor(rows, dtype=torch.float64)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def start_copy(self, values: Tensor) -> PendingCopy:
        """Begin to copy a tensor to the host."""
        return PendingCopy(values, wants_event=self.device.type == "cuda")


class PendingCopy:
    """A copy to the host that is under way."""

    def __init__(self, values: Tensor, *, wants_event: bool) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=wants_event)
        self._host.copy_(values, non_blocking=True)
        if wants_event:
            self._event = torch.cuda.Event()
            self._event.record()

    def take(self, *, wait: bool = False) -> Tensor | None:
        """The copied values in the host's memory, or None if they have not arrived and nobody waits for them."""
        if self._event is not None and not self._event.query():
            if not wait:
                return None
            self._event.synchronize()
        return self._host
