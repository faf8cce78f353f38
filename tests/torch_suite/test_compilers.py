"""Compiled programs, and parameters without values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_state import same
from tests.torch_suite.problem import Optimizer, build, problem


@pytest.fixture
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["step", "all"])
def test_compiled_programs_step_as_others(what: str, backend: str) -> None:
    """``inductor`` gives the same (tried by hand: it takes half a minute)."""
    results = []
    for compiled in (functools.partial(torch.compile, backend=backend), lambda function: function):
        weight, bias, loss = problem()
        optimizer = build([weight, bias])
        step = compiled(optimizer.step) if what == "step" else optimizer.step

        def train(optimizer: Optimizer = optimizer, step: Any = step, loss: Any = loss) -> None:
            optimizer.zero_grad()
            loss().backward()
            step()

        one = compiled(train) if what == "all" else train
        for _ in range(3):
            one()
        results.append((weight.detach().clone(), bias.detach().clone(), optimizer.get_d()))
    assert same(results[0], results[1])


def test_parameters_on_meta() -> None:
    """A model that has no memory yet: building, saving, loading; and a step, which nothing can be read of."""
    params = [nn.Parameter(torch.empty(33, 40, device="meta")), nn.Parameter(torch.empty(3, device="meta"))]
    optimizer = build(params)
    fresh = optimizer.state_dict()
    assert fresh["state"] == {}
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    saved = optimizer.state_dict()
    assert all(v.is_meta for entry in saved["state"].values() for v in entry.values() if isinstance(v, Tensor))
    assert optimizer.get_d() == [1e-3] and optimizer.skipped_steps == 0
    build(params).load_state_dict(saved)
    copy.deepcopy(optimizer)
    optimizer.eval()
    optimizer.train()
