"""Clipping gives the norm and the gradients of torch's on one process, on every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ppsf_dist import clip_grad_norm_
from tests.harness.counting import count_collectives, count_host_syncs
from tests.harness.layouts import LAYOUTS, Layout, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run

SHAPES = named_shapes("all")
# Torch adds the elements of a 1-norm one after the other.
TOLERANCES = {2.0: 1e-6, math.inf: 1e-6, 1.0: 1e-5}
MISSING = ("short", "tall")


def gradients(dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    return next(gradient_sequence(SHAPES, 1, dtype=dtype, missing=lambda _, name: name in MISSING))


def clip_on(layout: Layout, norm_type: float, max_norm: float, dtype: torch.dtype) -> dict[str, Any]:
    parameters = shard_parameters(initial_weights(SHAPES, dtype=dtype), layout)
    set_grads(parameters, gradients(dtype))
    values = list(parameters.values())
    clip_grad_norm_(values, math.inf, norm_type)
    with count_collectives() as collectives, count_host_syncs() as syncs:
        norm = clip_grad_norm_(values, max_norm, norm_type)
    assert type(norm) is Tensor and norm.ndim == 0
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert found.keys() == {name for name, _ in SHAPES} - set(MISSING)
    return {"norm": float(norm), "gradients": gather(found), "collectives": collectives.total, "syncs": syncs.total}


def expected(norm_type: float, max_norm: float, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """torch on one process, in fp64: what is left is the rounding of the result."""
    parameters = {name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES}
    for name, gradient in gradients(dtype).items():
        parameters[name].grad = None if gradient is None else gradient.double()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm, norm_type)
    return float(norm), {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.dist
@pytest.mark.parametrize("norm_type", TOLERANCES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_what_torch_gives_on_one_process(name: str, norm_type: float) -> None:
    norm, scaled = expected(norm_type, 0.25, torch.float32)
    assert norm > 0.25, "the test needs a norm that is clipped"
    layout = LAYOUTS[name]
    for variant in layout.every_shift():
        results = run(layout.world_size, clip_on, variant, norm_type, 0.25, torch.float32)
        assert len({result["norm"] for result in results}) == 1
        assert results[0]["norm"] == pytest.approx(norm, rel=TOLERANCES[norm_type])
        for result in results:
            assert result["collectives"] == (0 if name in ("single", "replicated", "fsdp_1") else 1)
            assert result["syncs"] == 0
        for key, value in results[0]["gradients"].items():
            assert torch.allclose(value.double(), scaled[key], rtol=TOLERANCES[norm_type], atol=0), key


@pytest.mark.dist
def test_bf16_gradients_have_a_norm_in_fp32() -> None:
    norm, _ = expected(2.0, 0.25, torch.bfloat16)
    for result in run(4, clip_on, LAYOUTS["fsdp_tp_2x2"], 2.0, 0.25, torch.bfloat16):
        assert result["norm"] == pytest.approx(norm, rel=1e-6)


def test_gradients_under_the_limit_stay_bit_for_bit() -> None:
    result = clip_on(LAYOUTS["single"], 2.0, 1e6, torch.float32)
    for name, gradient in gradients().items():
        assert gradient is None or torch.equal(result["gradients"][name], gradient)


def not_finite(layout: Layout) -> tuple[float, bool]:
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    values = list(parameters.values())
    set_grads(parameters, gradients())
    wide = parameters["wide"].grad
    assert wide is not None
    if dist.get_rank() == dist.get_world_size() - 1:
        (wide.to_local() if isinstance(wide, DTensor) else wide).view(-1)[-1] = math.inf
    before = gather_local(values)
    with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
        clip_grad_norm_(values, 1.0, error_if_nonfinite=True)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, gather_local(values), strict=True))
    return float(clip_grad_norm_(values, 1.0)), unchanged


def gather_local(parameters: list[Any]) -> list[Tensor]:
    found = [p.grad for p in parameters if p.grad is not None]
    return [(g.to_local() if isinstance(g, DTensor) else g).clone() for g in found]


@pytest.mark.dist
def test_every_rank_hears_of_a_value_that_is_not_finite() -> None:
    assert run(2, not_finite, LAYOUTS["fsdp_2"]) == [(math.inf, True)] * 2


def mixed_with_torch(layout: Layout) -> str:
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    set_grads(parameters, gradients())
    with pytest.raises(RuntimeError) as error:
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    return str(error.value)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "message"), [("mixed", "DTensor"), ("fsdp_tp_2x2", "same mesh")])
def test_torch_still_raises_where_this_one_is_needed(name: str, message: str) -> None:
    """When this fails, torch has learned it, and the documentation should say so."""
    layout = LAYOUTS[name]
    assert all(message in text for text in run(layout.world_size, mixed_with_torch, layout))


def test_arguments_and_small_cases() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    assert float(clip_grad_norm_([], 1.0)) == 0
    assert float(clip_grad_norm_(p, 1.0)) == 0 and float(clip_grad_norm_(p, 1.0, math.inf)) == 0
    p.grad = torch.tensor([3.0, 0.0, 4.0])
    assert float(clip_grad_norm_(p, math.inf)) == 5
    with pytest.raises(ValueError, match="max_norm=-1"):
        clip_grad_norm_(p, -1)
    with pytest.raises(ValueError, match="norm_type=0"):
        clip_grad_norm_(p, 1, 0)
