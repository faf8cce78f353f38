"""What needs no ranks, by hypothesis: where samples lie, and state that is saved and loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppsf_dist.sharding import flat_range
from ppsf_dist.state.samples import sample_indices
from tests.harness.layouts import set_grads, shard_parameters
from tests.harness.models import Shape, gradient_sequence, initial_weights
from tests.runs import SINGLE, make_optimizer
from tests.switches import EVERY
from tests.thorough.conftest import Amount
from tests.thorough.damage import content, equal
from tests.thorough.tally import Tally

MINUTES = 15
SHAPES: st.SearchStrategy[Shape] = st.lists(st.integers(1, 34), min_size=1, max_size=3).map(tuple)


def try_all(check: Callable[..., None], cases: int, **strategies: st.SearchStrategy[Any]) -> None:
    """The same cases in every run."""
    options = settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    options(given(**strategies)(check))()


@pytest.mark.campaign
@pytest.mark.timeout(MINUTES * 60)
def test_samples(amount: Amount, tally: Tally) -> None:
    """Parameters cut into flat ranges anywhere, by hypothesis: the pieces hold the samples of the whole."""

    def check(shape: Shape, cuts: list[float], slice_p: int) -> None:
        tally.tried += 1
        total = math.prod(shape)
        bounds = [0, *sorted(int(cut * total) for cut in cuts), total]
        boxes = [
            box for low, high in zip(bounds, bounds[1:], strict=False) for box in flat_range(shape, low, high - low)
        ]
        samples = [int(index) for box in boxes for index in box.flat_index()[sample_indices(box, slice_p)]]
        assert samples == list(range(0, total, slice_p))

    try_all(
        check,
        amount(5_000, 50),
        shape=SHAPES,
        cuts=st.lists(st.floats(0, 1), max_size=5),
        slice_p=st.sampled_from([1, 2, 8, 11]),
    )
    tally.conclude()


@pytest.mark.campaign
@pytest.mark.timeout(MINUTES * 60)
def test_state_dicts(amount: Amount, tally: Tally) -> None:
    """State dicts of random parameters, switches and dtypes, by hypothesis: the next step is the same bit for bit."""

    def check(shapes: list[Shape], switch: str, dtype: torch.dtype, groups: int, steps: int) -> None:
        tally.tried += 1
        named = [(f"p{index}", shape) for index, shape in enumerate(shapes)]
        gradients = list(gradient_sequence(named, steps + 1, dtype=dtype))
        ends = []
        for copied in (False, True):
            parameters = shard_parameters(initial_weights(named, dtype=dtype), SINGLE)
            optimizer = make_optimizer(parameters, min(groups, len(named)), **EVERY[switch])
            for step in range(steps + 1):
                if step == steps and copied:
                    saved = copy.deepcopy(optimizer.state_dict())
                    optimizer = make_optimizer(parameters, min(groups, len(named)), **EVERY[switch])
                    optimizer.load_state_dict(saved)
                set_grads(parameters, gradients[step])
                optimizer.step()
            ends.append(content(torch.nn.ParameterDict(parameters), optimizer))
        assert equal(*ends)

    try_all(
        check,
        amount(1_000, 5),
        shapes=st.lists(SHAPES.filter(lambda shape: math.prod(shape) < 5_000), min_size=1, max_size=3),
        switch=st.sampled_from(list(EVERY)),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        groups=st.integers(1, 2),
        steps=st.integers(0, 3),
    )
    tally.conclude()
