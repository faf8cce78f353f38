"""Ranks that would not compute the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.sharding.slots import Disagreement
from tests.harness.kernels import kernels
from tests.harness.layouts import LAYOUTS, shard_parameters
from tests.harness.models import initial_weights, named_shapes
from tests.harness.pool import run

SHAPES = named_shapes("small")


def first_step(others: str) -> tuple[str, bool]:
    """What rank 0 with native kernels and the others with ``others`` say, and whether weights stayed as they were."""
    rank = torch.distributed.get_rank()
    with kernels("native" if rank == 0 else others):
        parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS["replicated"])
        optimizer = ProdigyPlusScheduleFree(parameters.values(), process_group=torch.distributed.group.WORLD)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    said = ""
    try:
        optimizer.step()
    except Disagreement as error:
        said = str(error)
    return said, all(torch.equal(before[name], p) for name, p in parameters.items())


@pytest.mark.dist
def test_other_kernels_on_one_rank_are_an_error_on_all() -> None:
    for said, stayed in run(2, first_step, "eager"):
        assert "native" in said and "eager" in said and "PPSF_KERNELS=eager on all ranks" in said
        assert stayed


@pytest.mark.dist
def test_the_same_kernels_on_all_are_none() -> None:
    assert run(2, first_step, "native") == [("", False)] * 2


def test_gradients_may_lie_anywhere() -> None:
    """Transposed, expanded, every second element, of a dtype of their own: what the eager kernels make of them."""
    made = []
    for choice in ("native", "eager"):
        with kernels(choice):
            parameters = [nn.Parameter(torch.full((40, 33), 0.1)) for _ in range(3)]
            optimizer = ProdigyPlusScheduleFree(parameters, d0=1e-3)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            transposed, strided, expanded = parameters
            transposed.grad = torch.randn(33, 40, generator=generator).t()
            strided.grad = torch.randn(40, 66, generator=generator)[:, ::2]
            expanded.grad = torch.randn(40, 1, generator=generator).expand(40, 33)
            optimizer.step()
        made.append([p.detach() for p in parameters])
    for native, eager in zip(*made, strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-6, atol=1e-9)
