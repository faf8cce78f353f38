"""ScheduleFreeWrapper: order of calls, hooks, copies, what is refused. That it is schedulefree's: test_wrapper.py."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Optimizer

import ppsf_dist
from ppsf_dist import AdamWScheduleFree, Prodigy, ProdigyPlusScheduleFree, ScheduleFreeWrapper, averaged
from tests.harness.layouts import LAYOUTS, local, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.reference import close

SHAPES = named_shapes("small")


def small(**arguments: Any) -> tuple[nn.Parameter, ScheduleFreeWrapper]:
    parameter = nn.Parameter(torch.ones(3))
    return parameter, ScheduleFreeWrapper(SGD([parameter], lr=0.1), **arguments)


def test_s6_the_numbers_of_the_base_and_of_the_wrapper_do_not_meet() -> None:
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = ScheduleFreeWrapper(Prodigy([ours]))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = schedulefree.ScheduleFreeWrapper(prodigyopt.Prodigy([theirs]))
    reference.train()
    for _ in range(3):
        ours.grad, theirs.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        reference.step()
    (group,), (their_group,) = optimizer.param_groups, reference.param_groups
    assert group["k"] == group["wrapper_k"] == 3 and their_group["k"] == 6


def test_s7_a_first_step_of_length_zero_moves_nothing() -> None:
    parameter, optimizer = small()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 4)
    for step in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        assert torch.equal(parameter.detach(), torch.ones(3)) == (step == 0)
    assert optimizer.param_groups[0]["wrapper_weight_sum"] == pytest.approx(0.025**2 + 0.05**2)
    other = nn.Parameter(torch.ones(3))
    reference = schedulefree.ScheduleFreeWrapper(SGD([other], lr=0.0))
    reference.train()
    other.grad = torch.ones(3)
    with pytest.raises(ZeroDivisionError):
        reference.step()


def test_s8_a_parameter_without_dimensions() -> None:
    ours, theirs = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    optimizer = ScheduleFreeWrapper(SGD([ours], lr=0.1))
    reference = schedulefree.ScheduleFreeWrapper(SGD([theirs], lr=0.1))
    reference.train()
    for parameter in (ours, theirs):
        parameter.grad = torch.ones(())
    optimizer.step()
    assert float(ours.detach()) == pytest.approx(0.9)
    with pytest.raises(RuntimeError):
        reference.step()


def test_an_exception_of_the_base_leaves_weights_and_average() -> None:
    parameter, optimizer = small(weight_decay_at_y=0.0)
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
    before, z = parameter.detach().clone(), optimizer.z[parameter].clone()
    numbers = dict(optimizer.param_groups[0])

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.base.register_step_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert close(parameter.detach(), before) and torch.equal(optimizer.z[parameter], z)
    assert numbers == optimizer.param_groups[0]
    handle.remove()
    optimizer.step()
    assert optimizer.param_groups[0]["wrapper_k"] == 4


def test_averaged_and_eval_with_keep_bring_the_training_weights_back_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.randn(50).to(dtype))
        optimizer = ScheduleFreeWrapper(SGD([parameter], lr=0.1))
        for _ in range(4):
            parameter.grad = torch.randn(50).to(dtype)
            optimizer.step()
        before = parameter.detach().clone()
        with averaged(optimizer):
            assert not torch.equal(parameter, before)
        assert torch.equal(parameter, before)
        optimizer.eval(keep=dtype == torch.float32)
        with pytest.raises(RuntimeError, match="in eval mode: call train"):
            optimizer.step()
        optimizer.eval()
        optimizer.train()
        assert torch.equal(parameter, before)


def test_a_copy_goes_on_by_itself() -> None:
    parameter, optimizer = small()
    parameter.grad = torch.ones(3)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    assert other is not parameter
    before = other.detach().clone()
    optimizer.step()
    assert torch.equal(other, before)
    other.grad = torch.ones(3)
    twin.step()
    assert torch.equal(other, parameter)


def test_hooks_see_the_state_dicts_and_the_steps() -> None:
    parameter, optimizer = small()
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.register_state_dict_post_hook(lambda _, made: seen.append(f"saved {len(made['state'])}"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["step", "saved 1", "loaded"]


def test_a_group_may_come_later() -> None:
    parameter, optimizer = small()
    parameter.grad = torch.ones(3)
    optimizer.step()
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    for p in (parameter, late):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [group["wrapper_k"] for group in optimizer.param_groups] == [2, 1] and bool((late < 1).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 0.0}, r"momentum=0.0 is out of range: allowed is 0 < momentum < 1"),
        ({"momentum": "a"}, r"momentum='a' is out of range"),
        ({"weight_decay_at_y": -1.0}, r"weight_decay_at_y=-1.0 is out of range: allowed is a finite number >= 0"),
        ({"r": float("nan")}, r"r=nan is out of range"),
        ({"process_group": 3}, r"process_group=3 is a int"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_what_cannot_be_wrapped_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    with pytest.raises(TypeError, match="base=3 is a int: allowed is an optimizer"):
        ScheduleFreeWrapper(3)  # type: ignore[arg-type]
    averaging: list[Optimizer] = [
        AdamWScheduleFree(parameters),
        ProdigyPlusScheduleFree(parameters),
        ppsf_dist.SGDScheduleFreeClosure(parameters),
        schedulefree.SGDScheduleFree(parameters),
        small()[1],
    ]
    for base in averaging:
        with pytest.raises(ValueError, match=f"base is a {type(base).__name__}, which averages by itself"):
            ScheduleFreeWrapper(base)
    with pytest.raises(ValueError, match="base has fused_back_pass=True"):
        ScheduleFreeWrapper(ProdigyPlusScheduleFree(parameters, use_schedulefree=False, fused_back_pass=True))
    ScheduleFreeWrapper(ProdigyPlusScheduleFree(parameters, use_schedulefree=False, betas=(0.0, 0.99)))
    with pytest.warns(UserWarning, match="weight_decay_at_y=0.1 is multiplied by lr, but not by the step size d"):
        ScheduleFreeWrapper(Prodigy(parameters), weight_decay_at_y=0.1)


def test_bad_gradients_and_rates_are_named_before_anything_changes() -> None:
    parameter, optimizer = small()
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="the gradient of parameter 0"):
        optimizer.step()
    parameter.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = float("inf")
    with pytest.raises(ValueError, match=r"lr=inf is out of range: .* \(parameter group 0\)"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3)) and not optimizer.z


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    parameter, optimizer = small()
    parameter.grad = torch.ones(3)
    optimizer.step()
    z, numbers = optimizer.z[parameter].clone(), dict(optimizer.param_groups[0])
    good = optimizer.state_dict()
    bare = SGD([parameter], lr=0.3).state_dict()
    with pytest.raises(ValueError, match=r"no 'wrapper_k'.* call wrapper.base.load_state_dict"):
        optimizer.load_state_dict(bare)
    other = {**good, "state": {0: {"z": torch.ones(4)}}}
    with pytest.raises(ValueError, match=r"z has shape \(4,\), not \(3,\).*parameter 0"):
        optimizer.load_state_dict(other)
    broken = {**good, "param_groups": [{**good["param_groups"][0], "wrapper_momentum": 0.0}]}
    with pytest.raises(ValueError, match=r"wrapper_momentum=0.0 is out of range.*parameter group 0"):
        optimizer.load_state_dict(broken)
    assert torch.equal(optimizer.z[parameter], z) and optimizer.param_groups[0] == numbers
    optimizer.base.load_state_dict(bare)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_deepspeed_is_refused_with_the_way_out() -> None:
    parameter, optimizer = small()
    flat = nn.Parameter(torch.ones(3))
    parameter._dp_group = None  # type: ignore[attr-defined]
    # What ZeRO does to the groups of an optimizer that it is given.
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(3)
    with pytest.raises(NotImplementedError, match="name AdamWScheduleFree, .* in the config"):
        optimizer.step()


def test_d_of_the_base_is_shown() -> None:
    parameter, optimizer = small()
    with pytest.raises(AttributeError, match="SGD finds no step size d"):
        optimizer.get_d_estimate()
    assert ScheduleFreeWrapper(Prodigy([parameter], d0=1e-3)).get_d_estimate() == 1e-3


def fails_on_one_rank(fault: str) -> tuple[str, bool]:
    parameters = shard_parameters(initial_weights(SHAPES), LAYOUTS["fsdp_2"])
    optimizer = ScheduleFreeWrapper(SGD(list(parameters.values()), lr=0.1))
    for gradients in gradient_sequence(SHAPES, 2):
        set_grads(parameters, gradients)
        optimizer.step()
    before = {name: local(p).clone() for name, p in parameters.items()}
    alone = dist.get_rank() == 1

    def closure() -> float:
        if alone and fault == "closure":
            raise OSError("disk")
        return 0.0

    if alone and fault == "eval":
        optimizer.param_groups[0]["train_mode"] = False
    if alone and fault == "lr":
        optimizer.param_groups[0]["lr"] = -1.0
    try:
        optimizer.step(closure)
    except (OSError, RuntimeError, ValueError) as error:
        return str(error), all(torch.equal(local(p), before[name]) for name, p in parameters.items())
    return "", False


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "message"),
    [("eval", "in eval mode: call train"), ("lr", r"lr=-1.0 is out of range"), ("closure", "OSError: disk")],
)
def test_what_fails_on_one_rank_is_all_ranks_and_changes_nothing(fault: str, message: str) -> None:
    one, other = run(2, fails_on_one_rank, fault)
    assert "rank 1 of 2" in one[0] and re.search(message, one[0]) and re.search(message.split(": ")[-1], other[0])
    assert one[1] and other[1]


def test_averaged_names_an_optimizer_that_has_no_average() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a SGD, which has no average"), averaged(optimizer):
        pass
