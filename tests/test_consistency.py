"""Ranks that are not alike find out, all of them, and say which and where."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree, averaged, check_replicas
from ppsf_dist.sharding.fingerprint import checksum
from tests.harness.layouts import LAYOUTS, Layout, local, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import make_groups, make_optimizer
from tests.switches import EVERY, Switch

SHAPES = named_shapes("small")
DIFFERENT = 1
"""The rank that is not like the others."""
NUMBERS: dict[str, Any] = {
    "lr": 0.5,
    "betas": (0.9, 0.95),
    "beta3": 0.9,
    "beta4": 0.9,
    "growth_rate": 2.0,
    "weight_decay": 0.1,
    "d0": 1e-5,
    "d_coef": 1.5,
    "d_limiter": False,
    "prodigy_steps": 7,
    "schedulefree_c": 50,
    "eps": 1e-6,
    "split_groups": False,
    "split_groups_mean": True,
    "use_bias_correction": True,
    "use_cautious": True,
    "reference_quirks": False,
    "seed": 7,
}
"""Arguments of which one rank has another value."""

FAULTS = ["shape", "groups", "order", "missing", "dtype", "named", "swapped", "model", "content", "release", *NUMBERS]

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
    switches: Switch = {fault: NUMBERS[fault]} if is_different and fault in NUMBERS else {}
    groups = 2
    if is_different and fault == "groups":
        groups = 3
    if is_different and fault == "missing":
        parameters.pop(SHAPES[-1][0])
    dealt = make_groups(parameters, groups)
    if is_different and fault == "order":
        dealt[0]["params"][0], dealt[0]["params"][1] = dealt[0]["params"][1], dealt[0]["params"][0]
    if fault in ("named", "swapped", "model"):
        # Two parameters of one shape: only their names tell that a rank has swapped them.
        twins = shard_parameters({name: torch.ones(33, 40) for name in ("query", "key")}, layout)
        order = list(twins.items())[:: -1 if is_different and fault != "named" else 1]
        if is_different and fault == "named":
            order[1] = ("value", order[1][1])
        dealt = [{"params": order if fault != "model" else [p for _, p in order]}]
    if is_different and fault == "content":
        for parameter in parameters.values():
            if local(parameter).numel():
                change_one_bit(local(parameter.detach()))
    optimizer = ProdigyPlusScheduleFree(dealt, **switches)
    if fault == "model":
        with averaged(optimizer, nn.ParameterDict(twins)):
            pass
    if is_different and fault == "release":
        # As a rank does on whose host an older release is installed.
        older = {**optimizer._engine.common(), "the release of ppsf_dist": "0.0.1"}
        optimizer._engine.common = lambda: older  # type: ignore[method-assign]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert not optimizer.state, "a refused first step has made state"
        return str(error)
    return ""


EXPECTED = {
    "shape": "where one has parameter 4 (torch.float32 (64, 48) in group 1), the other has parameter 4 (torch.float32 ",
    "dtype": "where one has parameter 4 (torch.float32 (64, 48) in group 1), the other has parameter 4 (torch.bfloat16",
    "groups": "have 2 and 3 parameter groups",
    "order": "where one has parameter 0 (torch.float32 (48, 64) in group 0), the other has parameter 0 (torch.float32 ",
    "missing": "list 8 and 7 of them",
    "named": "where one has parameter 1 'key' (torch.float32 (33, 40) in group 0), the other has parameter 1 'value'",
    "swapped": "where one has parameter 0 'query' (torch.float32 (33, 40) in group 0), the other has parameter 0 'key'",
    "model": "where one has parameter 0 'query' (torch.float32 (33, 40) in group 0), the other has parameter 0 'key'",
    "release": "the release of ppsf_dist of the optimizer is '0.1.0' on rank 0 and '0.0.1' on rank 1",
    "seed": "seed of the optimizer is 0 on rank 0 and 7 on rank 1",
}


def first_steps(layout: Layout, faults: list[str]) -> dict[str, str]:
    return {fault: first_step(layout, fault) for fault in faults}


@pytest.mark.parametrize("layout", ["fsdp_2", "fsdp_4", "hsdp_2x2"])
def test_first_step_raises_on_every_rank(layout: str) -> None:
    faults = [fault for fault in FAULTS if fault != "content"]
    told = run(LAYOUTS[layout].world_size, first_steps, LAYOUTS[layout], faults)
    for fault in faults:
        messages = {of_rank[fault] for of_rank in told}
        assert len(messages) == 1, fault
        (message,) = messages
        default = inspect.signature(ProdigyPlusScheduleFree).parameters[fault].default if fault in NUMBERS else None
        expected = f"{fault} of parameter group 0 is {default!r} on rank 0 and {NUMBERS.get(fault)!r} on rank 1"
        assert EXPECTED.get(fault, expected) in message
        assert "0 and 1" in message or "rank 0 and " in message


@pytest.mark.parametrize("layout", ["hsdp_2x2", "mixed", "fsdp_tp_2x2"])
def test_copies_that_begin_with_other_values(layout: str) -> None:
    messages = set(run(LAYOUTS[layout].world_size, first_step, LAYOUTS[layout], "content"))
    assert len(messages) == 1
    assert "does not begin with the same values on rank" in messages.pop()


def test_first_step_of_ranks_that_are_alike() -> None:
    assert run(2, first_step, LAYOUTS["fsdp_2"], "none") == ["", ""]


def change_one_bit(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.int32)[-1] ^= 1


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
