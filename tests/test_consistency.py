"""Ranks that are not alike find out, all of them, and say which and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ppsf_dist import ProdigyPlusScheduleFree, check_replicas
from ppsf_dist.consistency import checksum
from tests.harness.layouts import LAYOUTS, Layout, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import make_groups, make_optimizer
from tests.switches import EVERY, Switch

SHAPES = named_shapes("small")
DIFFERENT = 1
"""The rank that is not like the others."""
FAULTS = ["shape", "switch", "groups", "order", "missing", "dtype"]

pytestmark = pytest.mark.dist


def first_step(layout: Layout, fault: str) -> str:
    """The error of a first step in which one rank has built its optimizer in another way; empty for none."""
    is_different = dist.get_rank() == DIFFERENT
    full = initial_weights(SHAPES)
    shapes = list(SHAPES)
    if is_different and fault == "shape":
        name, (rows, columns) = shapes[1]
        shapes[1] = (name, (rows, columns + 8))
        full = initial_weights(shapes)
    if is_different and fault == "dtype":
        full[shapes[1][0]] = full[shapes[1][0]].bfloat16()
    parameters = shard_parameters(full, layout)
    gradients = next(iter(gradient_sequence(shapes, 1)))
    set_grads(parameters, {name: g.to(full[name].dtype) if g is not None else g for name, g in gradients.items()})
    switches: Switch = {}
    groups = 2
    if is_different and fault == "switch":
        switches = {"use_cautious": True}
    if is_different and fault == "groups":
        groups = 3
    if is_different and fault == "missing":
        parameters.pop(SHAPES[-1][0])
    dealt = make_groups(parameters, groups)
    if is_different and fault == "order":
        dealt[0]["params"][0], dealt[0]["params"][1] = dealt[0]["params"][1], dealt[0]["params"][0]
    try:
        ProdigyPlusScheduleFree(dealt, **switches).step()
    except RuntimeError as error:
        return str(error)
    return ""


EXPECTED = {
    "shape": "parameter 4 is torch.float32 (64, 48) in group 1 on one and torch.float32 (64, 56) in group 1",
    "dtype": "parameter 4 is torch.float32 (64, 48) in group 1 on one and torch.bfloat16 (64, 48) in group 1",
    "switch": "disagree about the arguments of parameter group 0",
    "groups": "have 2 and 3 parameter groups",
    "order": "parameter 0 is torch.float32 (48, 64) in group 0 on one and torch.float32 (7, 33) in group 0",
    "missing": "list 8 and 7 of them",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", ["fsdp_2", "fsdp_4", "hsdp_2x2"])
def test_first_step_raises_on_every_rank(layout: str, fault: str) -> None:
    messages = run(LAYOUTS[layout].world_size, first_step, LAYOUTS[layout], fault)
    assert len(set(messages)) == 1
    assert EXPECTED[fault] in messages[0]
    assert "0 and 1" in messages[0] or "rank 0 and rank 1" in messages[0]


def test_first_step_of_ranks_that_are_alike() -> None:
    assert run(2, first_step, LAYOUTS["fsdp_2"], "none") == ["", ""]


def change_one_bit(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.int32)[-1] ^= 1


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check(layout: Layout, fault: str, rank: int, switch: Switch) -> str:
    """The error of a check after three steps with a fault on one rank; empty for none."""
    parameters = shard_parameters(initial_weights(SHAPES), layout)
    optimizer = make_optimizer(parameters, 2, **switch)
    check_replicas(optimizer)
    for gradients in gradient_sequence(SHAPES, 3):
        set_grads(parameters, gradients)
        optimizer.step()
        check_replicas(optimizer)
    if dist.get_rank() == rank:
        damaged = parameters["tall"]
        state: dict[str, Any] = optimizer.state[damaged]
        with torch.no_grad():
            if fault == "weights":
                change_one_bit(local(damaged))
            elif fault == "d":
                optimizer.param_groups[1]["d"] *= 1.001
            elif fault == "lr":
                optimizer.param_groups[0]["lr"] = 0.5
            elif fault == "swap":
                flat = local(damaged).view(-1)
                flat[:2] = flat[:2].flip(0)
            elif fault != "none":
                change_one_bit(local(state[fault]))
    try:
        check_replicas(optimizer)
    except RuntimeError as error:
        return str(error)
    return ""


def raised(layout: str, fault: str, rank: int, switch: Switch | None = None) -> str:
    """The one message that all ranks have raised."""
    messages = run(LAYOUTS[layout].world_size, check, LAYOUTS[layout], fault, rank, switch or {})
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize("switch", ["default", "momentum", "unfactored", "speed"])
@pytest.mark.parametrize("layout", ["replicated", "fsdp_2", "hsdp_2x2", "fsdp_tp_2x2", "mixed"])
def test_ranks_that_are_alike_pass(layout: str, switch: str) -> None:
    assert raised(layout, "none", 0, EVERY[switch]) == ""


@pytest.mark.parametrize("fault", ["weights", "swap", "z", "exp_avg_sq_row"])
def test_one_bit_of_a_replica_under_ddp(fault: str) -> None:
    message = raised("replicated", fault, 1)
    # "tall" is the first parameter of group 1, which follows the four of group 0.
    assert message.startswith("parameter 4 (torch.float32 (64, 48) in group 1): weights or state are not the same on ")
    assert "on rank 0 and rank 1:" in message


@pytest.mark.parametrize("fault", ["weights", "z"])
@pytest.mark.parametrize(("rank", "twin"), [(0, 2), (2, 0), (1, 3), (3, 1)])
def test_one_bit_of_a_replica_under_hsdp(fault: str, rank: int, twin: int) -> None:
    message = raised("hsdp_2x2", fault, rank)
    assert message.startswith("parameter 4 (torch.float32 (64, 48) in group 1)")
    assert f"on rank {min(rank, twin)} and rank {max(rank, twin)}:" in message


def test_factored_moments_are_whole_on_every_rank() -> None:
    message = raised("fsdp_4", "exp_avg_sq_col", 2)
    assert message.startswith("parameter 4 (torch.float32 (64, 48) in group 1)")
    assert "on ranks 0, 1, 3 and rank 2:" in message


def test_fsdp_has_no_second_copy_of_its_weights() -> None:
    assert raised("fsdp_4", "weights", 2) == ""


@pytest.mark.parametrize("layout", ["replicated", "fsdp_4", "hsdp_2x2"])
@pytest.mark.parametrize(("fault", "group"), [("d", 1), ("lr", 0)])
def test_numbers_of_a_group(layout: str, fault: str, group: int) -> None:
    message = raised(layout, fault, 1)
    assert message.startswith(f"{fault} of parameter group {group} is ")
    assert " on rank 0 and " in message and " on rank 1: " in message


def test_one_process_has_nobody_to_differ_from() -> None:
    assert raised("single", "weights", 0) == ""


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer is a SGD"):
        check_replicas(torch.optim.SGD([torch.zeros(1)]))


def test_checksum_sees_every_position_and_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8):
        tensor = torch.arange(1, 101).to(dtype)
        seen = {int(checksum([tensor], tensor.device))}
        for index in range(100):
            changed = tensor.clone()
            changed.view(torch.uint8)[index * dtype.itemsize] ^= 1
            seen.add(int(checksum([changed], tensor.device)))
        assert len(seen) == 101
    a, b = torch.zeros(3), torch.ones(2)
    assert checksum([a, b], a.device) != checksum([b, a], a.device)
    assert checksum([torch.zeros(2)], a.device) != checksum([torch.zeros(3)], a.device)
