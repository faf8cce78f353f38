"""A shard: what one rank holds of one logical parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.sharding.geometry import Box, Shape, whole


@dataclass(eq=False)
class Shard:
    """One rank's piece of one logical parameter. Adapters make them; the engine reads them.

    This class is a whole plain tensor; adapters for other layouts override what differs.

    Attributes:
        param: the tensor in ``param_groups`` that this shard belongs to, the key of its state.
        shape: shape of the whole logical parameter.
        boxes: the elements that this rank holds, in the order in which they lie in ``weights``. One box has the
            shape of the local tensor; several lie one after the other in a flat one.
        owner: whether this rank counts these elements in sums over the parameter. Exactly one rank counts each.
        completed: the gradient of this step, where the parameter's ``grad`` holds only this rank's summand.
        domain: ranks among which the parameter is divided or repeated, in order; empty for this process alone.
        copied: whether other ranks hold the same elements.
    """

    param: Tensor
    shape: Shape
    boxes: tuple[Box, ...]
    owner: bool = True
    domain: tuple[int, ...] = ()
    copied: bool = False
    completed: Tensor | None = None

    def repeat(self, ranks: tuple[int, ...]) -> None:
        """Say that all of these ranks hold these elements; the first of them counts them."""
        self.domain, self.owner, self.copied = ranks, dist.get_rank() == ranks[0], len(ranks) > 1

    def weights(self) -> Tensor:
        """The local weights: writing to them changes the parameter."""
        return self.param

    def gradient(self) -> Tensor | None:
        """The local gradient, or None if this rank has none this step."""
        if self.completed is not None:
            return self.completed
        return self.local(self.param.grad) if self.param.grad is not None else None

    def summand(self) -> tuple[dist.ProcessGroup, Tensor] | None:
        """Where the gradient is still a sum over ranks: their group, and this rank's summand.

        The engine sums them all at once and puts the results into ``completed`` for the step.
        """
        return None

    def local(self, tensor: Tensor) -> Tensor:
        """The plain local tensor of a tensor that lies like the parameter."""
        return tensor

    def spread(self, local: Tensor) -> Tensor:
        """The inverse of ``local`` for a checkpoint: a tensor that distributed checkpoints can reshard."""
        return local

    def spread_rows(self, local: Tensor) -> Tensor:
        """The same for a matrix with one row for each row of the parameter that this shard touches.

        Shards that share a row each fill what is theirs and leave zeros elsewhere.
        """
        return local

    def extract_rows(self, value: Tensor) -> Tensor:
        """This rank's rows of a checkpointed matrix with one row for each row of the parameter."""
        return value.narrow(0, self.first_row, self.row_count)

    @property
    def first_row(self) -> int:
        """The first row of the parameter that this shard touches."""
        return self.boxes[0].offset[0] if self.boxes and self.shape else 0

    @property
    def row_count(self) -> int:
        """How many rows of the parameter this shard touches."""
        if not self.boxes:
            return 0
        return self.boxes[-1].offset[0] + self.boxes[-1].size[0] - self.first_row if self.shape else 1

    def extract(self, value: Tensor) -> Tensor:
        """This rank's piece of a checkpointed tensor of the whole parameter, laid out like ``weights``."""
        parts = []
        for box in self.boxes:
            part = value
            for axis, (start, n) in enumerate(zip(box.offset, box.size, strict=True)):
                part = part.narrow(axis, start, n)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])

    @property
    def numel(self) -> int:
        return sum(box.numel for box in self.boxes)

    def views(self, local: Tensor) -> list[Tensor]:
        """One view for each box of a tensor that lies like ``weights``."""
        if len(self.boxes) == 1 and local.shape == torch.Size(self.boxes[0].size):
            return [local]
        start, views = 0, []
        for box in self.boxes:
            views.append(local.narrow(0, start, box.numel).view(box.size))
            start += box.numel
        return views


def plain_shard(param: Tensor) -> Shard:
    """A whole parameter on this process."""
    shape = tuple(param.shape)
    return Shard(param, shape, (whole(shape),))
