"""Plans that are made anew between steps."""

from __future__ import annotations

import pytest

from tests.harness.layouts import set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.runs import SINGLE, make_optimizer


@pytest.mark.parametrize("prodigy_steps", [0, 50])
def test_d_written_together_with_a_switch_is_the_next_steps(prodigy_steps: int) -> None:
    """A new plan compares numbers between ranks, and shows what is on the device for it: not over what was written."""
    shapes = named_shapes("small")
    parameters = shard_parameters(initial_weights(shapes), SINGLE)
    optimizer = make_optimizer(parameters, 2, prodigy_steps=prodigy_steps)
    first, second = gradient_sequence(shapes, 2)
    set_grads(parameters, first)
    optimizer.step()
    for group in optimizer.param_groups:
        group["d"], group["use_grams"] = 0.5, True
    set_grads(parameters, second)
    optimizer.step()
    assert optimizer.get_d() == [0.5, 0.5]
