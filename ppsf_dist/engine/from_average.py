"""A step of an optimizer whose weights are the average x between steps: to the training weights y and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppsf_dist.state.writes import Write

if TYPE_CHECKING:
    from ppsf_dist.engine.engine import Engine


def step_from_average(engine: Engine, closure: Callable[[], float]) -> float | None:
    """One step, with x kept aside as long as the closure looks at y.

    x moves towards the new z only where a parameter has moved: elsewhere, and after a step that changed nothing or was
    ended by an exception, it is bit for bit what it was.

    Args:
        engine: of the optimizer.
        closure: computes the loss and its gradients.
    """
    # A checkpoint of a run that was at y.
    engine.switch(train=False, keep=False)
    layout = engine.current_layout()
    shards = dict(engine.trained_shards(layout))
    others = [p for params in layout.parameters() for p in params if p in engine.state and p not in shards]
    shards |= {shard.param: shard for shard in layout.shards(others, engine.process_group)}
    kept = {param: (shard, shard.weights().clone()) for param, shard in shards.items()}
    before = _updates(engine)
    unplanned = [param for param in shards if param not in before]
    before |= {param: torch.tensor(float(engine.state.get(param, {}).get("step", 0))) for param in unplanned}
    engine.switch(train=True, keep=False)
    try:
        return engine.run(closure)
    finally:
        after = _updates(engine)
        coefficients = {
            shard.param: plan.buffers.coefficients["c"][slot]
            for plan in engine.plans.values()
            for shard, slot in zip(plan.shards, plan.slot_of_shard, strict=True)
        }

        def averages() -> Iterator[Write]:
            for param, (shard, x) in kept.items():
                if param not in after:
                    yield Write([shard.weights()], [x])
                    continue
                z = engine.state[param]["z"].to(torch.float32)
                moved = x.to(torch.float32).lerp(z, coefficients[param])
                has_moved = after[param] > before[param].to(after[param].device)
                yield Write([shard.weights()], [torch.where(has_moved, moved.to(x.dtype), x)])

        engine.put_average(lambda: list(averages()))


def _updates(engine: Engine) -> dict[Tensor, Tensor]:
    """How many updates each planned parameter has had, on the device."""
    return {
        shard.param: updates[slot]
        for plan in engine.plans.values()
        for updates in [plan.parameters[0].clone()]
        for shard, slot in zip(plan.shards, plan.slot_of_shard, strict=True)
    }
