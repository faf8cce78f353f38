"""How tensors are cut into tiles and stacked does not matter for the result, only for the time."""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.kernels.eager import work
from ppsf_dist.kernels.eager.work import IN_CACHE, TEMPORARIES, Sizes, few_launches
from tests.harness.kernels import as_on_an_accelerator, kernels
from tests.harness.models import named_shapes
from tests.rotation import rotated
from tests.runs import SINGLE, Run, difference, open_loop, twice
from tests.switches import EVERY, Switch

SHAPES = [*named_shapes("small"), *((f"equal{i}", (33, 40)) for i in range(3))]
STEPS = 6
SIZES = {
    "small_tiles": Sizes(tile=97, stack=0),
    "small_stacks": Sizes(tile=3000, stack=1500),
    "large": few_launches(10**11),
}


@functools.cache
def expected_run(dtype: torch.dtype, name: str) -> Run:
    return run_with(IN_CACHE, dtype, EVERY[name])


def run_with(sizes: Sizes, dtype: torch.dtype, switch: Switch) -> Run:
    with kernels("eager"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "sizes_for", lambda device: sizes)
        return open_loop(SINGLE, SHAPES, STEPS, groups=2, dtype=dtype, **switch)


@pytest.mark.parametrize(("name", "sizes"), rotated(EVERY, SIZES, rounds=1))
def test_sizes_do_not_change_a_run(name: str, sizes: str) -> None:
    ours = run_with(SIZES[sizes], torch.float32, EVERY[name])
    expected = expected_run(torch.float32, name)
    apart, d_allowed = difference(ours, expected), 1e-6
    if name == "d_limiter":
        # Without a limit d multiplies rounding errors from step to step, here those of another order of summation.
        noisy = open_loop(SINGLE, SHAPES, STEPS, groups=2, noisy=True, **EVERY[name])
        d_allowed = twice(difference(noisy, expected), most={"d": 1e-5, "weights": 1e-6})["d"]
    assert apart["d"] <= d_allowed and apart["weights"] <= 1e-5, apart


@pytest.mark.parametrize("sizes", SIZES)
def test_rounding_bits_belong_to_elements_not_to_tiles(sizes: str) -> None:
    ours = run_with(SIZES[sizes], torch.bfloat16, {})
    expected = expected_run(torch.bfloat16, "default")
    differing = sum(int((ours.weights[key] != value).sum()) for key, value in expected.weights.items())
    assert differing <= sum(value.numel() for value in expected.weights.values()) / 1000


def most_bytes(run: Callable[[], None], path: Path) -> int:
    """Most that is allocated at once, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return int(max(itertools.accumulate(event["args"]["Bytes"] for event in events)))


@pytest.mark.parametrize("shapes", [[(128, 128)] * 4, [(500, 512)]], ids=["stacked", "cut"])
@pytest.mark.parametrize("name", EVERY)
def test_a_step_needs_thirteen_tiles_at_most(
    name: str, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On an accelerator, whose gates the host does not know, with weights in bf16, which need more than in fp32."""
    sizes = Sizes(tile=1 << 16, stack=1 << 15)
    monkeypatch.setattr(work, "sizes_for", lambda device: sizes)
    as_on_an_accelerator(monkeypatch)
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    with kernels("eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = ProdigyPlusScheduleFree(parameters, **EVERY[name])
    peak = most_bytes(optimizer.step, tmp_path / "trace.json")
    state = sum(
        value.nbytes for of in optimizer.state.values() for value in of.values() if isinstance(value, torch.Tensor)
    )
    assert peak - state <= TEMPORARIES * sizes.tile * 4
