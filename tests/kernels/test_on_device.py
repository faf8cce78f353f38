"""What ``python -m tests.on_device`` does on a GPU, rehearsed on a CPU."""

from __future__ import annotations

import pytest
import torch

import ppsf_dist
from ppsf_dist.kernels.numbers import FAST_NUMBERS
from tests import on_device
from tests.harness.kernels import interpreted
from tests.harness.pool import run
from tests.kernels.sides import CUTS

SISTERS = [name for name in on_device.RUNS if " " in name]


@pytest.mark.parametrize("name", ["momentum", *SISTERS])
def test_runs_are_compared_and_what_is_apart_is_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_device.check("runs", "cpu", name, torch.float32)
    assert [(one.what, one.off) for one in found] == [("eager", False), ("native", False)], found
    monkeypatch.setitem(on_device.ALLOWED, torch.float32, {"d": -1.0, "weights": 1.0})
    assert all(one.off for one in on_device.check("runs", "cpu", name, torch.float32))


def test_every_kind_of_numbers_is_among_the_runs() -> None:
    classes = {getattr(ppsf_dist, name) for name, _ in on_device.RUNS.values()}
    assert {cls.method.step_numbers for cls in classes} == set(FAST_NUMBERS)


def test_what_breaks_is_off_and_says_why() -> None:
    (found,) = on_device.check("runs", "cpu", "no such switch", torch.float32)
    assert found.off and "no such switch" in found.figure


def _on_small_shards() -> list[on_device.Found]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "SHARDS", {name: CUTS[name] for name in ("whole", "very tall", "odd", "flat")})
        return on_device.check("shards", "cpu", "default", torch.float32)


@pytest.mark.dist
def test_steps_are_compared_on_every_kind_of_shard() -> None:
    assert CUTS.items() <= on_device.SHARDS.items()
    (found,) = run(1, interpreted, _on_small_shards)
    kinds = ("whole", "very tall", "odd", "flat", "together")
    assert [(one.what, one.off) for one in found] == [(f"a step, {kind}", False) for kind in kinds]
