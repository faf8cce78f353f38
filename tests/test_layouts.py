"""The invariant: the result does not depend on the layout."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.harness.layouts import LAYOUTS
from tests.harness.models import named_shapes
from tests.harness.pool import run
from tests.runs import SINGLE, Run, difference, open_loop, open_loop_without_start
from tests.switches import EVERY

pytestmark = pytest.mark.dist
STEPS = 8
SHAPES = named_shapes("small")
SHARDED = [name for name, layout in LAYOUTS.items() if layout.world_size > 1]


@functools.cache
def single(switch: str, dtype: torch.dtype) -> Run:
    return open_loop(SINGLE, SHAPES, STEPS, groups=2, dtype=dtype, **EVERY[switch])


@pytest.mark.parametrize("switch", EVERY)
@pytest.mark.parametrize("name", SHARDED)
def test_every_layout_gives_the_run_of_one_process(name: str, switch: str) -> None:
    reference = single(switch, torch.float32)
    layout = LAYOUTS[name]
    for variant in layout.every_shift() if switch in ("default", "speed") else [layout]:
        runs = run(
            layout.world_size, open_loop_without_start, variant, SHAPES, STEPS, groups=2, **EVERY[switch]
        )
        for other in runs[1:]:
            assert other.groups == runs[0].groups, "ranks disagree about the numbers of a group"
        apart = difference(runs[0], reference)
        assert apart["d"] <= 1e-6, apart
        assert apart["weights"] <= 1e-5, apart
