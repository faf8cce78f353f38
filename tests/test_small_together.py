"""Small parameters whose hooks run in a backward pass are stepped together: the run is that of ``step()``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.engine import together
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.switches import EVERY
from tests.test_backward import SWITCHES
from tests.test_layouts import sometimes_missing

SHAPES = named_shapes("small")
STEPS = 6
Parameters = dict[str, nn.Parameter]
Ended = Callable[[Any], None]


def backward(parameters: Parameters, gradients: dict[str, Tensor | None]) -> None:
    """A backward pass that leaves these gradients."""
    terms = [(parameters[name] * gradient).sum() for name, gradient in gradients.items() if gradient is not None]
    torch.stack(terms).sum().backward()


def hooked(*, clears: bool = False, **switches: Any) -> tuple[Parameters, ProdigyPlusScheduleFree]:
    parameters = {name: nn.Parameter(value) for name, value in initial_weights(SHAPES).items()}
    optimizer = ProdigyPlusScheduleFree(parameters.values(), fused_back_pass=True, **{"d0": D0} | switches)

    def hook(p: Tensor) -> None:
        optimizer.step_param(p)
        assert sum(one.nbytes for one in optimizer._engine._small._gradients.values()) <= together.KEPT
        if clears:
            assert p.grad is not None
            p.grad.zero_()
        p.grad = None

    for p in parameters.values():
        p.register_post_accumulate_grad_hook(hook)
    return parameters, optimizer


def stepped(**switches: Any) -> tuple[Parameters, ProdigyPlusScheduleFree]:
    """The run of step(), missing gradients and all."""
    parameters = {name: nn.Parameter(value) for name, value in initial_weights(SHAPES).items()}
    optimizer = ProdigyPlusScheduleFree(parameters.values(), **{"d0": D0} | switches)
    for gradients in gradient_sequence(SHAPES, STEPS, missing=sometimes_missing):
        backward(parameters, gradients)
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


def check(one: tuple[Parameters, ProdigyPlusScheduleFree], other: tuple[Parameters, ProdigyPlusScheduleFree]) -> None:
    assert one[1].get_d() == pytest.approx(other[1].get_d(), rel=1e-6)
    assert one[1].param_groups[0]["k"] == other[1].param_groups[0]["k"]
    for name, p in one[0].items():
        torch.testing.assert_close(p.detach(), other[0][name].detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ends", ["step", "eval and train", "the next backward pass"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_run_is_that_of_step(switch: str, ends: str) -> None:
    parameters, optimizer = hooked(clears=True, **EVERY[switch])
    for gradients in gradient_sequence(SHAPES, STEPS, missing=sometimes_missing):
        backward(parameters, gradients)
        if ends == "step":
            optimizer.step()
        elif ends == "eval and train" and optimizer.param_groups[0]["use_schedulefree"]:
            optimizer.eval(keep=True)
            optimizer.train()
    optimizer.state_dict()
    check((parameters, optimizer), stepped(**EVERY[switch]))


def test_a_backward_pass_of_small_ones_has_one_plan_and_the_weights_are_there_when_it_ends() -> None:
    parameters, optimizer = hooked()
    for gradients in gradient_sequence(SHAPES, 3):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        backward(parameters, gradients)
        # Nobody has called step(): the next forward pass of such a trainer reads these.
        assert all(not torch.equal(p, before[name]) for name, p in parameters.items() if p.numel())
        assert len(optimizer._engine.plans) == 1
        optimizer.step()


def test_what_waits_is_bounded_and_large_ones_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "KEPT", 4000)
    monkeypatch.setattr(together, "SMALL", 2000)
    parameters, optimizer = hooked()
    most = 0
    for gradients in gradient_sequence(SHAPES, STEPS, missing=sometimes_missing):
        backward(parameters, gradients)
        most = max(most, len(optimizer._engine.plans))
        optimizer.step()
    assert most > 1
    check((parameters, optimizer), stepped())


def test_a_backward_pass_that_breaks_off_leaves_what_had_come_to_the_next_step() -> None:
    """As without waiting: what was handed over before the exception is stepped, d and k are those of the next step."""

    def broken(*, waits: bool) -> tuple[Parameters, ProdigyPlusScheduleFree]:
        with pytest.MonkeyPatch.context() as patch:
            if not waits:
                patch.setattr(together, "SMALL", -1)
            parameters, optimizer = hooked()
            gradients = next(iter(gradient_sequence(SHAPES, 1)))
            backward(parameters, gradients)
            optimizer.step()
            last = list(parameters.values())[0]
            handle = last.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                backward(parameters, gradients)
            handle.remove()
            for p in parameters.values():
                p.grad = None
            optimizer.step()
            return parameters, optimizer

    check(broken(waits=True), broken(waits=False))


def test_errors_come_out_of_the_backward_pass_and_nothing_is_left_behind() -> None:
    parameters, optimizer = hooked()
    gradients = next(iter(gradient_sequence(SHAPES, 1)))
    backward(parameters, gradients)
    optimizer.step()
    optimizer.eval()
    x = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(RuntimeError, match="call optimizer.train()"):
        backward(parameters, gradients)
    assert all(torch.equal(p, x[name]) for name, p in parameters.items())
    optimizer.train()
    backward(parameters, gradients)
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 3


def test_a_gradient_that_is_not_finite_holds_back_what_is_stepped_with_it() -> None:
    parameters, optimizer = hooked()
    gradients = next(iter(gradient_sequence(SHAPES, 1)))
    backward(parameters, gradients)
    optimizer.step()
    before, d = {name: p.detach().clone() for name, p in parameters.items()}, optimizer.get_d()
    name = next(name for name, gradient in gradients.items() if gradient is not None and gradient.numel())
    backward(parameters, gradients | {name: torch.full_like(before[name], torch.inf)})
    optimizer.step()
    assert optimizer.get_d() == d and optimizer.skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_loading_forgets_what_waits() -> None:
    parameters, optimizer = hooked()
    first, second = gradient_sequence(SHAPES, 2)
    backward(parameters, first)
    optimizer.step()
    saved, weights = optimizer.state_dict(), {name: p.detach().clone() for name, p in parameters.items()}

    def loads(_: Tensor) -> None:
        optimizer.load_state_dict(saved)

    next(reversed(parameters.values())).register_post_accumulate_grad_hook(loads)
    last = list(parameters)[-1]
    backward(parameters, {last: second[last]})
    assert torch.equal(parameters[last], weights[last])


def test_together_is_cheaper_than_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of 40 pairs; a backward pass and the steps in it took 0.4 to 0.55 of the time."""

    def adapters() -> Callable[[], float]:
        params = [nn.Parameter(torch.randn(16, 512)) for _ in range(40)] + [
            nn.Parameter(torch.zeros(512, 16)) for _ in range(40)
        ]
        optimizer = ProdigyPlusScheduleFree(params, fused_back_pass=True)
        for p in params:
            p.register_post_accumulate_grad_hook(optimizer.step_param)

        def step() -> float:
            for p in params:
                p.grad = None
            began = time.process_time()
            torch.stack([(p * 1e-3).sum() for p in params]).sum().backward()
            optimizer.step()
            return time.process_time() - began

        return step

    waits = adapters()
    together_time = min(waits() for _ in range(7))
    monkeypatch.setattr(together, "SMALL", -1)
    alone = adapters()
    assert together_time <= 0.75 * min(alone() for _ in range(7))
