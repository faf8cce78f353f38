"""Steps: the right direction, nothing to do, empty tensors, default dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from tests.test_state import same
from tests.torch_suite.problem import (
    INFO,
    Given,
    Optimizer,
    build,
    build_given,
    every_input,
    problem,
    steps,
    through_a_file,
)


@every_input
@pytest.mark.parametrize(
    ("contiguous", "schedulers"), [(True, ()), (False, ()), (True, INFO.scheduler_inputs)], ids=["", "strided", "lr"]
)
def test_forloop_goes_right_direction(given: Given, contiguous: bool, schedulers: Any) -> None:
    weight, bias, loss = problem()
    if not contiguous:
        weight.data = torch.randn(10, 5, 2)[..., 0]
        bias.data = torch.randn(10, 2)[..., 0]
    optimizer = build_given([weight, bias], given)
    attached: list[Any] = [scheduler(optimizer) for scheduler in schedulers]
    first = float(loss())
    for _ in range(20):
        steps(optimizer, loss, 1)
        for scheduler in attached:
            scheduler.step(*([loss()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert float(loss()) < first


def test_param_group_with_lrscheduler_goes_right_direction() -> None:
    weight, bias, loss = problem()
    optimizer = build([{"params": [weight]}, {"params": [bias], "lr": 0.1}])
    scheduler = StepLR(optimizer, gamma=0.9, step_size=10)
    first = float(loss())
    for _ in range(20):
        steps(optimizer, loss, 1)
        scheduler.step()
    assert float(loss()) < first


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(shape: tuple[int, ...]) -> None:
    results = []
    for lr in (0.5, torch.full(shape, 0.5)):
        weight, bias, loss = problem()
        optimizer = Optimizer([weight, bias], lr=lr, d0=1e-3)  # type: ignore[arg-type]
        scheduler: LRScheduler = StepLR(optimizer, gamma=0.9, step_size=2)
        for _ in range(4):
            steps(optimizer, loss, 1)
            scheduler.step()
        resumed = Optimizer([weight, bias], lr=copy.deepcopy(lr), d0=1e-3)  # type: ignore[arg-type]
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        steps(resumed, loss, 2)
        assert isinstance(resumed.param_groups[0]["lr"], Tensor) is isinstance(lr, Tensor)
        results.append((weight.detach().clone(), bias.detach().clone()))
    assert same(results[0], results[1])


@every_input
def test_step_is_noop_when_params_have_no_grad(given: Given) -> None:
    params = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    optimizer = build_given(params, given)
    optimizer.step()
    assert same(before, [p.detach() for p in params])


@every_input
def test_step_is_noop_for_zero_grads(given: Given) -> None:
    if given.kwargs.get("use_focus"):
        # FOCUS pulls weights towards their average whatever the gradient, as in the reference: nothing to ask here.
        return
    param = nn.Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    optimizer = build_given([param], given)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(before, param)


@pytest.mark.parametrize("shape", [(0, 40), (40, 0), (0,), (3, 0, 40)])
@every_input
def test_empty_parameters(given: Given, shape: tuple[int, ...]) -> None:
    """Alone they are nothing to do, beside others they change nothing; their state is saved and loaded."""
    results = []
    for empty in (False, True):
        weight, bias, loss = problem()
        nothing = [nn.Parameter(torch.empty(shape))] if empty else []
        optimizer = build_given([weight, bias, *nothing], given)
        for _ in range(3):
            for p in nothing:
                p.grad = torch.empty_like(p)
            loss().backward()
            optimizer.step()
        if empty:
            resumed = build_given([weight, bias, *nothing], given)
            resumed.load_state_dict(through_a_file(optimizer.state_dict()))
            assert same(optimizer.state_dict(), resumed.state_dict())
            optimizer.eval()
            optimizer.train()
        results.append((weight.detach().clone(), [group.get("d") for group in optimizer.param_groups]))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0])


def test_empty_groups() -> None:
    weight, bias, loss = problem()
    optimizer = build([{"params": []}, {"params": [weight, bias]}, {"params": []}])
    steps(optimizer, loss)
    resumed = build([{"params": []}, {"params": [weight, bias]}, {"params": []}])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(optimizer.state_dict(), resumed.state_dict())
    steps(resumed, loss)


def test_complex_and_sparse_are_refused() -> None:
    complex_parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_parameter.grad = torch.ones_like(complex_parameter)
    with pytest.raises(ValueError, match="complex64"):
        build([complex_parameter]).step()


def test_set_default_dtype_works() -> None:
    """Numbers do not depend on torch's default dtype."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            param = nn.Parameter(torch.linspace(0, 1, 33 * 40, dtype=torch.float32).view(33, 40))
            optimizer = build([param])
            for _ in range(3):
                param.grad = param.detach().clone()
                optimizer.step()
            results.append((param.detach().clone(), optimizer.state_dict()["state"]))
        finally:
            torch.set_default_dtype(torch.float32)
    assert same(results[0], results[1])
