"""What ``torch.compile`` leaves as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_disabled = functools.cache(torch.compiler.disable)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let a compiled program call a function as it is, and break its graph there.

    A plan of a step is made from Python objects that a compiler would trace anew, and its kernels run under
    ``no_grad`` on views, which a traced graph may not mix with the views of the program around it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            # The compiler is not even imported then, which takes a second.
            return function(*args, **kwargs)
        result: R = _disabled(function)(*args, **kwargs)
        return result

    return run
