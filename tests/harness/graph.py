"""A stand-in for a CUDA graph on a CPU: what a function launches is recorded, and run again on the same memory.

Operators of torch are run again on the tensors that they were given, and their results written over those of the first
time; so are Triton's kernels, in its interpreter. Whatever else the function did in Python is not repeated: as in a
real graph, that is the point. Unlike one, recording also runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self, recorded: list[Callable[[], object]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorded = recorded

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

        def again() -> None:
            leaves = tree_leaves(func(*args, **(kwargs or {})))
            for work in leaves:
                if isinstance(work, torch.ScriptObject):
                    # A collective.
                    work.wait()  # type: ignore[attr-defined]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            for before, now in zip(results, tensors, strict=True):
                if now is not before and not func.is_view:
                    before.copy_(now)

        self._recorded.append(again)
        return result


class _Counter(TorchDispatchMode):
    def __init__(self, launched: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._launched = launched

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        # Others look at memory in another way, or ask for some.
        if func.namespace == "aten" and not func.is_view and "empty" not in str(func):
            self._launched.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def _each_launch(seen: Callable[[Any, Callable[[], object]], None]) -> Iterator[None]:
    """Calls a function with each kernel that Triton's interpreter launches, and what launches it again."""
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.run

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        seen(self, lambda: launch(self, *args, **kwargs))
        with _disable_current_modes():
            launch(self, *args, **kwargs)

    InterpretedFunction.run = launched
    try:
        yield
    finally:
        InterpretedFunction.run = launch


def launches(function: Callable[[], object]) -> list[str]:
    """What a function would launch on an accelerator, at least: torch's operators, and Triton's kernels."""
    launched: list[str] = []
    with _each_launch(lambda kernel, again: launched.append(kernel.fn.__name__)), _Counter(launched):
        function()
    return launched


def record(function: Callable[[], object]) -> Callable[[], object]:
    """As ``ppsf_dist.captured.record_cuda_graph``. State is as before the recording when this returns."""
    recorded: list[Callable[[], object]] = []
    with _each_launch(lambda kernel, again: recorded.append(again)), _Recorder(recorded):
        function()

    @torch.no_grad()
    def replay() -> None:
        for step in recorded:
            step()

    return replay
