"""The ranks that share sums are those on which the parameters live that are trained now."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.harness.layouts import LAYOUTS, Layout, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import SINGLE, make_optimizer

SHAPES = named_shapes("small")
FIRST = SHAPES[1][0]
"""The parameter that trains alone at first: under the layout ``mixed`` a plain tensor, whose rank needs no other."""


def thaw(layout: Layout) -> tuple[dict[str, Tensor], list[float]]:
    """Two steps in which one parameter trains, then six in which all do."""
    parameters: dict[str, Any] = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 8)):
        for name, parameter in parameters.items():
            parameter.requires_grad_(step >= 2 or name == FIRST)
        set_grads(parameters, {name: g if parameters[name].requires_grad else None for name, g in gradients.items()})
        optimizer.step()
    return gather(parameters), optimizer.get_d()


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_that_thaw_in_mid_run(layout: str) -> None:
    expected, expected_d = thaw(SINGLE)
    for weights, d in run(LAYOUTS[layout].world_size, thaw, LAYOUTS[layout]):
        assert d == pytest.approx(expected_d, rel=1e-6)
        for name, value in expected.items():
            assert float((weights[name] - value).abs().max()) < 1e-6, name
