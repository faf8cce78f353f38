"""Stepping in the backward pass, when that ends in an exception."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import step_in_backward
from tests.harness.layouts import gather, local
from tests.harness.models import D0
from tests.harness.pool import run
from tests.test_backward import loss_of
from tests.test_fsdp import Tied, batch, wrap


class Failed(Exception):
    pass


def ended_early(after: str) -> dict[str, Any]:
    """A backward pass ends in an exception when the sums of a group are on their way; what the user does then."""
    model = wrap(Tied(), "default")
    assert isinstance(model, FSDPModule) and isinstance(model.blocks, nn.ModuleList)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0, fused_back_pass=True)
    step_in_backward(model, optimizer)
    tokens = batch(0).chunk(2)[dist.get_rank()]

    def step() -> None:
        loss_of(model, tokens).backward()
        optimizer.step()

    step()
    saved = copy.deepcopy(optimizer.state_dict())
    started = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    block = model.blocks[0]
    assert isinstance(block, nn.Sequential)

    def fail(*_: Any) -> None:
        raise Failed

    handle = block.register_full_backward_pre_hook(fail)
    with pytest.raises(Failed):
        loss_of(model, tokens).backward()
    handle.remove()
    begun = optimizer._engine._begun is not None
    if after == "load_state_dict":
        optimizer.load_state_dict(saved)
    else:
        getattr(optimizer, after)()
    moved = [name for name, p in model.named_parameters() if not torch.equal(local(p), started[name])]
    if after == "eval":
        optimizer.train()
    # FSDP2 frees what the backward pass that has failed left gathered when the next forward pass begins.
    model.reshard()
    optimizer.zero_grad()
    optimizer.step()
    k = [group["k"] for group in optimizer.param_groups]
    return {
        "begun": begun,
        "moved": moved,
        "k": k,
        "d": optimizer.get_d(),
        "weights": gather(dict(model.named_parameters())),
    }


@pytest.mark.dist
@pytest.mark.parametrize("after", ["step", "state_dict", "eval", "load_state_dict"])
def test_a_backward_pass_that_ends_early_leaves_no_sum_behind(after: str) -> None:
    """The group that has begun is stepped, unless another state is loaded; nobody waits for anybody."""
    first, second = run(2, ended_early, after)
    assert first["begun"] and second["begun"]
    assert (first["d"], first["k"]) == (second["d"], second["k"])
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    stepped = after != "load_state_dict"
    assert any("blocks.1" in name for name in first["moved"]) == stepped
    assert not any("blocks.0" in name for name in first["moved"]) or after == "eval"
