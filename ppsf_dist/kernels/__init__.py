"""The three passes over memory.

``ppsf_dist.kernels.interface`` says what a backend computes; ``ppsf_dist.kernels.eager`` is the readable one
that runs anywhere and that every faster one is tested against; ``ppsf_dist.kernels.choice`` chooses.
"""

from __future__ import annotations

from typing import Any

from ppsf_dist.kernels.choice import Use

__all__ = ["Use", "report"]


def report(optimizer: Any) -> tuple[Use, ...]:
    """Which kernels compute the steps of an optimizer, and why some are eager.

    ``print(*report(optimizer), sep="\\n")`` shows it.

    Args:
        optimizer: one of this package that has made a step; it is chosen then, from what the parameters are.

    Returns:
        For each backend, and each reason not to use a faster one, how many of this rank's parameters it computes.

    Raises:
        RuntimeError: it has made no step yet.
        TypeError: it is none of this package's own kernels' (a wrapped optimizer of torch computes its own step).
    """
    engine = getattr(optimizer, "_engine", None)
    if engine is None:
        raise TypeError(f"{type(optimizer).__name__} has no kernels of ppsf_dist: give an optimizer of this package")
    uses: dict[tuple[str, str], Use] = {}
    for plan in engine.plans.values():
        for use in plan.passes.uses:
            known = uses.get((use.backend, use.why))
            uses[use.backend, use.why] = use if known is None else known.together(use)
    if not uses:
        raise RuntimeError("no step has been made yet, and kernels are chosen by the first: call this after step()")
    return tuple(uses.values())
