"""What the modules for trainers share: which weights are in the model, and what a log shows of d."""

from __future__ import annotations

from typing import Any

from ppsf_dist.optimizers.base import DistributedOptimizer

LOGGED = ("d", "d_lr", "d_effective_lr")
"""What stands in a log beside the learning rate; of groups that differ each with its number, ``d_0``, ``d_1``, ..."""


def step_sizes(optimizer: DistributedOptimizer) -> dict[str, float]:
    """d, d * lr and d * effective_lr by the names of ``LOGGED``; nothing for a class that finds no d."""
    found: dict[str, float] = {}
    for name in LOGGED:
        factor = name.removeprefix("d").removeprefix("_")
        values = [
            float(group["d"]) * (float(group[factor]) if factor else 1.0)
            for group in optimizer.param_groups
            if "d" in group and factor in ("", *group)
        ]
        if len(set(values)) == 1:
            found[name] = values[0]
        else:
            found |= {f"{name}_{index}": value for index, value in enumerate(values)}
    return found


def trains(optimizer: Any) -> bool:
    """Whether an average stands aside while the training weights are in the model."""
    return isinstance(optimizer, DistributedOptimizer) and any(
        group.get("train_mode") and optimizer.method.switches(group).schedulefree for group in optimizer.param_groups
    )
