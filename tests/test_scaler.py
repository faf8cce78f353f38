"""Loss scaling and gradient accumulation under fully_shard give the run without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.fsdp import FSDPModule

from ppsf_dist import ProdigyPlusScheduleFree, clip_grad_norm_
from tests.harness.layouts import gather
from tests.harness.models import D0
from tests.harness.pool import run
from tests.test_backward import loss_of, numbers
from tests.test_fsdp import Tied, batch, wrap
from tests.test_nonfinite import bits, same

pytestmark = pytest.mark.dist
WORLDS = [("default", 2), ("hsdp", 4)]
STEPS = 6
# A power of two: scaling and unscaling are then exact.
SCALE = 1024.0


def start(how: str) -> tuple[Any, ProdigyPlusScheduleFree]:
    model = wrap(Tied(), how)
    assert isinstance(model, FSDPModule)
    return model, ProdigyPlusScheduleFree(model.parameters(), d0=D0)


def my_batch(step: int) -> Tensor:
    return batch(step).chunk(dist.get_world_size())[dist.get_rank()]


def scaled(how: str) -> bool:
    """Whether a run with a scaler has the bits of the same run without one."""
    results = []
    for scales in (True, False):
        model, optimizer = start(how)
        scaler = GradScaler("cpu", init_scale=SCALE, enabled=scales)
        for step in range(STEPS):
            scaler.scale(loss_of(model, my_batch(step))).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((bits(dict(model.named_parameters()), optimizer), numbers(optimizer)))
        assert optimizer.param_groups[0]["k"] == STEPS + 1
    return same(*results)


@pytest.mark.parametrize(("how", "world_size"), WORLDS)
def test_a_scaled_run_is_the_unscaled_run(how: str, world_size: int) -> None:
    assert all(run(world_size, scaled, how))


def overflowing(how: str) -> tuple[float, int]:
    """Steps in which one shard has an infinite gradient; returns the scale after them, and k."""
    model, optimizer = start(how)
    scaler = GradScaler("cpu", init_scale=SCALE)
    parameters = dict(model.named_parameters())
    for step in range(4):
        scaler.scale(loss_of(model, my_batch(step))).backward()
        is_bad = step in (0, 2)
        # One shard; under HSDP both of its replicas, which hold the same gradient.
        if is_bad and dist.get_rank() % 2 == 1:
            gradient = parameters["embed.weight"].grad
            assert gradient is not None
            gradient.to_local()[0, 0] = float("inf")
        before = (bits(parameters, optimizer) if step else [], numbers(optimizer))
        weights = gather(parameters)
        scaler.step(optimizer)
        scaler.update()
        now = (bits(parameters, optimizer) if step else [], numbers(optimizer))
        assert same(before, now) == is_bad
        assert same(weights, gather(parameters)) == is_bad
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 0, "the scaler did not call step()"
    return scaler.get_scale(), optimizer.param_groups[0]["k"]


@pytest.mark.parametrize(("how", "world_size"), WORLDS)
def test_an_overflow_on_one_rank_skips_the_step_on_all(how: str, world_size: int) -> None:
    assert run(world_size, overflowing, how) == [(SCALE / 4, 3)] * world_size


def accumulated(how: str, micro_batches: int) -> dict[str, Any]:
    model, optimizer = start(how)
    for _ in range(10):
        # The same again: d moves only while gradients agree.
        parts = my_batch(0).chunk(micro_batches)
        for number, part in enumerate(parts):
            model.set_requires_gradient_sync(number == len(parts) - 1)
            (loss_of(model, part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "d": optimizer.get_d(),
        "k": optimizer.param_groups[0]["k"],
        "weights": gather(dict(model.named_parameters())),
    }


@pytest.mark.parametrize(("how", "world_size"), WORLDS)
def test_two_micro_batches_are_one_batch(how: str, world_size: int) -> None:
    ours, whole = run(world_size, accumulated, how, 2), run(world_size, accumulated, how, 1)
    assert all(other["d"] == ours[0]["d"] for other in ours)
    assert ours[0]["k"] == whole[0]["k"] == 11
    assert whole[0]["d"][0] > 1.5 * D0, "the test needs a d that moves"
    assert ours[0]["d"] == pytest.approx(whole[0]["d"], rel=1e-6)
    for name, expected in whole[0]["weights"].items():
        torch.testing.assert_close(ours[0]["weights"][name], expected, rtol=1e-5, atol=2e-7)
