"""The parameter sets are deterministic, and their gradients make Prodigy work."""

from __future__ import annotations

import pytest
import torch
from prodigyplus import ProdigyPlusScheduleFree

from tests.harness.models import D0, KINDS, ZERO_PREFIX, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run

WANTED_SHAPES = {
    *((48, 64), (64, 48), (48, 48), (2, 64), (64, 1), (31, 31), (7, 33), (40,), (5,), (1,), ()),
    *((64, 32, 3, 3), (32, 64, 3, 3), (32, 3, 3, 3), (64, 8, 32), (8, 64, 32), (8, 32, 64)),
}


def _weights_and_gradients() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor | None]]]:
    torch.rand(1)  # The default generator must have no say.
    shapes = named_shapes("all")
    return initial_weights(shapes), list(gradient_sequence(shapes, 2))


def test_the_awkward_shapes_are_there() -> None:
    assert {shape for _, shape in named_shapes("single_process")} == WANTED_SHAPES
    assert {shape for _, shape in named_shapes("all")} == WANTED_SHAPES - {()}


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique_attributes_and_zeros_are_zero(kind: str) -> None:
    names = [name for name, _ in named_shapes(kind)]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)
    for name, weight in initial_weights(named_shapes(kind)).items():
        assert bool(weight.any()) is not name.startswith(ZERO_PREFIX)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'none'; allowed are matrices,"):
        named_shapes("none")


@pytest.mark.dist
def test_every_process_gets_the_same_numbers() -> None:
    expected = _weights_and_gradients()
    for got in run(2, _weights_and_gradients):
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)


def test_a_gradient_does_not_depend_on_the_other_parameters() -> None:
    alone = list(gradient_sequence([("tall", (64, 48))], 3))
    among = list(gradient_sequence(named_shapes("matrices"), 3))
    for one, many in zip(alone, among, strict=True):
        torch.testing.assert_close(one["tall"], many["tall"], rtol=0.0, atol=0.0)
    reseeded = next(gradient_sequence([("tall", (64, 48))], 1, seed=1))["tall"]
    assert reseeded is not None and alone[0]["tall"] is not None
    assert not torch.equal(reseeded, alone[0]["tall"])


def _missing_short_on_odd_steps(step: int, name: str) -> bool:
    return name == "short" and step % 2 == 1


def test_missing_gradients_leave_the_others_alone() -> None:
    shapes = named_shapes("vectors")
    complete = list(gradient_sequence(shapes, 4))
    holed = list(gradient_sequence(shapes, 4, missing=_missing_short_on_odd_steps))
    for step, (whole, partial) in enumerate(zip(complete, holed, strict=True)):
        for name, gradient in partial.items():
            expected = None if _missing_short_on_odd_steps(step, name) else whole[name]
            torch.testing.assert_close(gradient, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", ["matrices", "small", "all"])
@pytest.mark.parametrize("d_limiter", [True, False])
def test_prodigy_raises_d_on_these_gradients(kind: str, d_limiter: bool) -> None:
    shapes = named_shapes(kind)
    parameters = {name: torch.nn.Parameter(weight) for name, weight in initial_weights(shapes).items()}
    optimizer = ProdigyPlusScheduleFree(parameters.values(), d0=D0, d_limiter=d_limiter)
    history = []
    for gradients in gradient_sequence(shapes, 10):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimizer.step()
        history.append(optimizer.param_groups[0]["d"])
    growth = [after / before for before, after in zip(history, history[1:], strict=False)]
    if d_limiter:
        assert growth[2:] == pytest.approx([2**0.25] * 7)
    else:
        # Each step's sums move d by their own amount, so that a wrong sum in any of them shows.
        assert min(growth[2:]) > 1.5 and len(set(growth[2:])) == 7
