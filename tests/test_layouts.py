"""The invariant: the result does not depend on the layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.engine import reductions
from tests.harness.layouts import LAYOUTS, Layout, gather, set_grads, shard_parameters
from tests.harness.models import NamedShapes, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.rotation import rotated
from tests.runs import SINGLE, Run, difference, make_optimizer, open_loop, open_loop_without_start, twice
from tests.switches import EVERY

pytestmark = pytest.mark.dist
STEPS = 6
SHAPES = named_shapes("small")
ALL_SHAPES = named_shapes("all")
SHARDED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1]


UNSTABLE = {"d_limiter": {"d": 2e-5, "weights": 2.5e-6}}
"""Here d multiplies rounding errors from step to step, in one process too: at most to so much."""

DRAWS = 8
"""Of rounding noise: one alone may by chance be far below what others make of it."""

FSDP = ("fsdp_1", "fsdp_2", "fsdp_3", "fsdp_4", "fsdp_real")


@functools.cache
def single(switch: str, dtype: torch.dtype = torch.float32, *, noisy: int = 0, all_shapes: bool = False) -> Run:
    shapes = ALL_SHAPES if all_shapes else SHAPES
    return open_loop(SINGLE, shapes, STEPS, groups=2, dtype=dtype, noisy=noisy, **EVERY[switch])


def on_layout(layout: Layout, shapes: NamedShapes, steps: int = STEPS, **kwargs: Any) -> Run:
    """The run of rank 0, after a check that all ranks have the same numbers, bit for bit."""
    runs = run(layout.world_size, open_loop_without_start, layout, shapes, steps, groups=2, **kwargs)
    for other in runs[1:]:
        assert other.groups == runs[0].groups, "ranks disagree about the numbers of a group"
    first: Run = runs[0]
    return first


@pytest.mark.parametrize(("name", "switch"), rotated(SHARDED, EVERY))
def test_every_layout_gives_the_run_of_one_process(name: str, switch: str) -> None:
    reference = single(switch)
    allowed = {"d": 1e-6, "weights": 1e-5}
    if switch in UNSTABLE:
        draws = [difference(single(switch, noisy=draw), reference) for draw in range(1, DRAWS + 1)]
        noise = {key: max(draw[key] for draw in draws) for key in allowed}
        allowed = twice(noise, most=UNSTABLE[switch])
    apart = difference(on_layout(LAYOUTS[name], SHAPES, **EVERY[switch]), reference)
    assert apart["d"] <= allowed["d"] and apart["weights"] <= allowed["weights"], (apart, allowed)


def in_portions(layout: Layout, **switch: Any) -> Run:
    """A run in which sums of g^2 travel in several parts, as those of large models do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "OF_A_PORTION", 64)
        return open_loop_without_start(layout, SHAPES, STEPS, groups=2, **switch)


@pytest.mark.parametrize(("name", "switch"), rotated(SHARDED, ("default", "speed", "cautious", "orthograd"), rounds=1))
def test_sums_that_travel_while_pass_1_goes_on_give_the_same_run(name: str, switch: str) -> None:
    """No matter which of the passes are native: OrthoGrad's are not."""
    layout = LAYOUTS[name]
    runs = run(layout.world_size, in_portions, layout, **EVERY[switch])
    assert all(other.groups == runs[0].groups for other in runs[1:])
    apart = difference(runs[0], single(switch))
    assert apart["d"] <= 1e-6 and apart["weights"] <= 1e-5, apart
    at_once = on_layout(layout, SHAPES, **EVERY[switch])
    assert runs[0].collectives == at_once.collectives and at_once.asynchronous == 0
    assert (runs[0].asynchronous > 0) == (at_once.collectives > 0)


@pytest.mark.parametrize("switch", ["default", "speed"])
@pytest.mark.parametrize("name", SHARDED)
def test_every_shape_in_every_role(name: str, switch: str) -> None:
    reference = single(switch, all_shapes=True)
    for variant in LAYOUTS[name].every_shift():
        apart = difference(on_layout(variant, ALL_SHAPES, **EVERY[switch]), reference)
        assert apart["d"] <= 1e-6 and apart["weights"] <= 1e-5, (variant.shift, apart)


SIXTEEN_BIT = (
    "default", "speed", "unfactored", "momentum", "low_factors", "no_quirks", "cautious", "orthograd",
    "no_stableadamw", "atan2", "adopt",
)  # fmt: skip


@pytest.mark.parametrize(("name", "switch"), rotated(SHARDED, SIXTEEN_BIT))
def test_bf16_weights_and_their_rounding_do_not_depend_on_the_layout(name: str, switch: str) -> None:
    """Sums are in another order, so now and then an element falls on the other side of its rounding threshold."""
    reference = single(switch, torch.bfloat16)
    ours = on_layout(LAYOUTS[name], SHAPES, dtype=torch.bfloat16, **EVERY[switch])
    assert difference(ours, reference)["d"] <= 1e-6
    differing = total = 0
    for key, expected in reference.weights.items():
        apart = (ours.weights[key].float() - expected.float()).abs()
        unit = torch.finfo(torch.bfloat16).eps * expected.float().abs().clamp_min(1e-3)
        assert bool((apart <= 2 * unit).all()), f"{key} is off by more than a rounding unit"
        differing += int((apart > 0).sum())
        total += apart.numel()
    assert differing <= total / 1000


def sometimes_missing(step: int, name: str) -> bool:
    """One parameter never has a gradient, one comes late, one pauses."""
    return name == "short" or (name == "wide" and step < 3) or (name == "vector" and step in (4, 5))


@functools.cache
def with_missing(switch: str) -> Run:
    return open_loop(SINGLE, SHAPES, 8, groups=2, missing=sometimes_missing, **EVERY[switch])


@pytest.mark.parametrize(
    ("name", "switch"), rotated(SHARDED, ["default", "speed", "adopt", "momentum", "bias_correction"])
)
def test_parameters_without_gradients(name: str, switch: str) -> None:
    reference = with_missing(switch)
    ours = on_layout(LAYOUTS[name], SHAPES, 8, missing=sometimes_missing, **EVERY[switch])
    apart = difference(ours, reference)
    assert apart["d"] <= 1e-6 and apart["weights"] <= 1e-5, apart
    assert torch.equal(ours.weights["short"], reference.start["short"])


@functools.cache
def a_hundred_steps() -> Run:
    return open_loop(SINGLE, SHAPES, 100, groups=2)


@pytest.mark.parametrize("name", FSDP)
def test_d_over_a_hundred_steps(name: str) -> None:
    reference = a_hundred_steps()
    ours = on_layout(LAYOUTS[name], SHAPES, 100)
    assert reference.numbers("d")[-1][0] > 10 * reference.numbers("d")[0][0], "the test needs a d that moves"
    assert difference(ours, reference)["d"] <= 1e-6


def one_rank_without(layout: Layout, missing: bool) -> tuple[dict[str, Tensor], list[float]]:
    """The last rank has no gradient for its piece, or a gradient of zeros: both mean the same."""
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2)
    for gradients in gradient_sequence(SHAPES, STEPS):
        set_grads(parameters, gradients)
        if dist.get_rank() == dist.get_world_size() - 1:
            for name, parameter in parameters.items():
                if name == "wide":
                    assert parameter.grad is not None
                    parameter.grad = None if missing else torch.zeros_like(parameter.grad)
        optimizer.step()
    return gather(parameters), optimizer.get_d()


@pytest.mark.parametrize("name", ["fsdp_2", "fsdp_4", "shard1", "fsdp_tp_2x2"])
def test_a_gradient_that_is_missing_on_some_ranks_is_zero_there(name: str) -> None:
    weights, d = run(LAYOUTS[name].world_size, one_rank_without, LAYOUTS[name], True)[0]
    expected_weights, expected_d = run(LAYOUTS[name].world_size, one_rank_without, LAYOUTS[name], False)[0]
    assert d == expected_d
    for key, expected in expected_weights.items():
        assert torch.equal(weights[key], expected), key
