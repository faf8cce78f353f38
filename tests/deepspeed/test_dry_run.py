"""What a dry run says of ZeRO, against engines that really run."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from ppsf_dist.dry_run import Share, forecast
from ppsf_dist.methods.switches import Switches
from ppsf_dist.zero.forecast import ZERO_SUB_GROUP
from tests.deepspeed.engines import config, count_in_steps, deepspeed_on_cpu
from tests.harness.kernels import kernels
from tests.harness.pool import run
from tests.switches import EVERY
from tests.test_dry_run import expected, held_as_state, make_model, switches_of

pytestmark = pytest.mark.deepspeed
CHOSEN = ["default", "unfactored", "speed", "adopt", "momentum"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANKS = 4


def real(stage: int, names: list[str], dtype: torch.dtype) -> list[tuple[Share, list[int]]]:
    """What this rank holds after two steps under each switch, and the sizes of its reductions."""
    deepspeed = deepspeed_on_cpu()
    results = []
    for name in names:
        optimizer = {"optimizer": {"type": "ProdigyPlusScheduleFree", "params": EVERY[name]}}
        with kernels("eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine, *_ = deepspeed.initialize(model=make_model(torch.float32), config=config(stage, dtype) | optimizer)
        counted = count_in_steps(engine.basic_optimizer)
        for _ in range(2):
            counted.clear()
            engine.backward(engine(torch.randn(5, 33, dtype=dtype)).float().square().mean())
            engine.step()
        (collectives,) = counted
        shards = engine.basic_optimizer._engine.current_layout().partition.slices.values()
        elements = sum(shard.numel for shard in shards)
        in_model = elements if stage == 3 else sum(parameter.numel() for parameter in engine.module.parameters())
        flats = {shard.flat.untyped_storage().data_ptr() for shard in shards}
        for tensor in low_precision(engine, stage):
            assert tensor.untyped_storage().data_ptr() not in flats, "the fp32 weights are another copy"
        share = replace(
            held_as_state(engine.basic_optimizer, list(engine.module.parameters())),
            elements=elements,
            weights=in_model * dtype.itemsize + 4 * elements,
        )
        results.append((share, list(collectives.sizes)))
        engine.destroy()
    return results


def low_precision(engine: Any, stage: int) -> list[torch.Tensor]:
    """The weights that the model computes with, as this rank keeps them."""
    return [parameter.ds_tensor.data if stage == 3 else parameter.data for parameter in engine.module.parameters()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_number_is_that_of_a_real_engine(stage: int, dtype: str) -> None:
    by_rank = run(RANKS, real, stage, CHOSEN, DTYPES[dtype])
    for index, name in enumerate(CHOSEN):
        foreseen = expected(f"zero{stage}", name, DTYPES[dtype])
        assert len(foreseen.shares) == RANKS
        for rank in range(RANKS):
            share, sizes = by_rank[rank][index]
            # DeepSpeed has let go of the gradients by now.
            assert replace(share, gradients=foreseen.shares[rank].gradients) == foreseen.shares[rank], (name, rank)
            assert tuple(sizes) == foreseen.reductions, (name, rank)


def test_sub_groups_cost_reductions() -> None:
    """At stage 3 DeepSpeed steps a large model in several calls."""
    optimizer: dict[str, Any] = {"params": [torch.zeros(1, requires_grad=True)]}
    from ppsf_dist import ProdigyPlusScheduleFree

    switches: Switches = switches_of(ProdigyPlusScheduleFree([optimizer]))
    half = (ZERO_SUB_GROUP // 2 // 1000, 1000)
    for parameters, calls in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3)):
        foreseen = forecast([(half, torch.bfloat16)] * parameters * 2, switches, "zero3", 2)
        assert len(foreseen.reductions) == 2 * calls
