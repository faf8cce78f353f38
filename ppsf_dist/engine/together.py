"""Small parameters whose gradients come one by one in a backward pass are stepped together, by its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import Variable

SMALL = 1 << 18
"""Bytes of a gradient that waits for others: what a step on its own costs is then more than to copy it."""
KEPT = 1 << 22
"""Bytes of all that wait, at most."""


class Waiting:
    """Parameters that wait, with copies of their gradients: whoever has computed these frees or clears them.

    Args:
        step: steps those that wait. It is called when the backward pass ends in which they came.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._gradients: dict[Tensor, Tensor] = {}
        self._bytes = 0
        self._backward = -1

    def __contains__(self, param: object) -> bool:
        return param in self._gradients

    @property
    def is_full(self) -> bool:
        """Whether no more should wait."""
        return self._bytes > KEPT - SMALL

    def add(self, param: Tensor) -> bool:
        """Let a parameter wait if it is small and a backward pass runs, whose end will come; say whether it does."""
        gradient, backward = param.grad, torch._C._current_graph_task_id()
        if gradient is None or gradient.nbytes > SMALL or backward < 0:
            return False
        if backward != self._backward:
            Variable._execution_engine.queue_callback(self._step)
            self._backward = backward
        self._gradients[param] = gradient.clone()
        self._bytes += gradient.nbytes
        return True

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """Those that wait, each with its gradient; none waits any more."""
        kept, self._gradients, self._bytes = self._gradients, {}, 0
        now = {param: param.grad for param in kept}
        for param, gradient in kept.items():
            param.grad = gradient
        try:
            yield list(kept)
        finally:
            for param, of_others in now.items():
                param.grad = of_others

    def forget(self) -> None:
        """Nobody waits any more."""
        self._gradients, self._bytes = {}, 0
