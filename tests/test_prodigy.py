"""What is Prodigy's own: its arguments and errors, and where it differs from prodigyopt 1.1.2 on purpose.

That it is its reference otherwise, on every layout: ``tests/test_family.py``.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn

from ppsf_dist import Prodigy
from ppsf_dist.fsdp import step_in_backward
from tests.harness.layouts import LAYOUTS, set_grads, shard_parameters
from tests.harness.models import D0, NamedShapes, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.runs import make_groups, make_other

SHAPES = named_shapes("small")


def pair(dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Any, Any, Any, Any]:
    start = initial_weights(SHAPES, dtype=dtype)
    ours, theirs = ({name: nn.Parameter(value.clone()) for name, value in start.items()} for _ in range(2))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = prodigyopt.Prodigy(make_groups(theirs, 2), **arguments)
    return ours, make_other("Prodigy", ours, 2, **arguments), theirs, reference


def test_arguments_their_order_and_their_defaults_are_the_references() -> None:
    ours, theirs = (inspect.signature(cls).parameters for cls in (Prodigy, prodigyopt.Prodigy))
    assert {name: p.default for name, p in theirs.items()} == {name: ours[name].default for name in theirs}
    assert list(ours)[: len(theirs)] == list(theirs)


def test_fsdp_in_use_is_accepted_and_said_to_be_unnecessary() -> None:
    with pytest.warns(UserWarning, match="fsdp_in_use=True is not needed"):
        optimizer = Prodigy([nn.Parameter(torch.ones(3))], fsdp_in_use=True)
    assert "fsdp_in_use" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d0": 0.0}, r"d0=0.0 is out of range: allowed is a finite number > 0"),
        ({"growth_rate": 0.5}, r"growth_rate=0.5 is out of range: allowed is a number >= 1, or inf"),
        ({"growth_rate": math.nan}, r"growth_rate=nan is out of range"),
        ({"slice_p": 0}, r"slice_p=0 is out of range: allowed is an integer >= 1"),
        ({"slice_p": 1.5}, r"slice_p=1.5 is out of range"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0 is out of range"),
        ({"decouple": 2}, r"decouple=2 is out of range: allowed is True or False"),
        ({"lr": 0.0}, r"lr=0.0 is out of range: allowed is a finite number > 0"),
        ({"eps": 0.0}, r"eps=0.0 is out of range"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prodigy([nn.Parameter(torch.ones(2))], **arguments)


def test_groups_must_agree_on_what_belongs_to_the_one_d() -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for name, value in {"d0": 1e-3, "beta3": 0.5, "d_coef": 2.0, "growth_rate": 2.0, "safeguard_warmup": True}.items():
        groups: list[dict[str, Any]] = [{"params": [one]}, {"params": [two], name: value}]
        with pytest.raises(ValueError, match=f"{name} is .* in group 0 and .* in group 1"):
            Prodigy(groups)


def test_a_learning_rate_of_its_own_in_a_group_is_refused() -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [{"params": [one]}, {"params": [two], "lr": 0.5}]
    with pytest.raises(ValueError, match="lr is 1.0 in group 0, 0.5 in group 1: one step size d serves all groups"):
        Prodigy(groups)


def test_a_schedule_that_parts_the_learning_rates_changes_nothing() -> None:
    ours, optimizer, _, _ = pair(d0=D0)
    first, second, *_ = gradient_sequence(SHAPES, 2)
    set_grads(ours, first)
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    optimizer.param_groups[1]["lr"] = 0.5
    set_grads(ours, second)
    with pytest.raises(ValueError, match="lr is 1.0 in group 0, 0.5 in group 1"):
        optimizer.step()
    assert all(torch.equal(ours[name], value) for name, value in before.items())
    optimizer.param_groups[1]["lr"] = 1.0
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 2


def test_learning_rates_that_are_tensors_and_differ_change_nothing() -> None:
    ours, optimizer, _, _ = pair(d0=D0)
    for group, lr in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
        group["lr"] = torch.tensor(lr)
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    for step, gradients in enumerate(gradient_sequence(SHAPES, 2)):
        set_grads(ours, gradients)
        optimizer.step()
        assert optimizer.skipped_steps == step + 1
    assert all(torch.equal(ours[name], value) for name, value in before.items())


def test_p1_a_group_with_lr_0_stands_still() -> None:
    """The reference leaves it out of its sums, but steps it with the momentum that it had, and decays it."""
    ours, optimizer, theirs, reference = pair(d0=D0, weight_decay=0.1)
    still = list(ours)[1::2]
    for step, gradients in enumerate(gradient_sequence(SHAPES, 8)):
        if step == 5:
            before = {name: (ours[name].detach().clone(), theirs[name].detach().clone()) for name in still}
            for group in (optimizer.param_groups[1], reference.param_groups[1]):
                group["lr"] = 0.0
        for parameters in (ours, theirs):
            set_grads(parameters, gradients)
        optimizer.step()
        reference.step()
    assert all(torch.equal(ours[name], at_rest) for name, (at_rest, _) in before.items())
    assert all(not torch.equal(theirs[name], moved) for name, (_, moved) in before.items())
    # What is summed is the same: so is d.
    assert optimizer.get_d()[0] == pytest.approx(reference.param_groups[0]["d"], rel=1e-5)


def test_p1_without_momentum_such_a_group_does_not_explode() -> None:
    def moved(optimizer: Any, parameter: nn.Parameter, other: nn.Parameter) -> float:
        start = parameter.detach().clone()
        for step in range(3):
            for index, one in enumerate((other, parameter)):
                one.grad = torch.full_like(one, 0.1 * (step + 1 + index))
            optimizer.step()
        return float((parameter.detach() - start).abs().max())

    def parameters() -> tuple[list[dict[str, Any]], nn.Parameter, nn.Parameter]:
        one, two = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        return [{"params": [one]}, {"params": [two], "lr": 0.0}], two, one

    groups, still, other = parameters()
    with contextlib.redirect_stdout(io.StringIO()):
        assert moved(prodigyopt.Prodigy(groups, betas=(0.0, 0.99)), still, other) > 1
    groups, still, other = parameters()
    with pytest.warns(UserWarning, match=r"betas\[0\]=0"):
        assert moved(Prodigy(groups, betas=(0.0, 0.99)), still, other) == 0


def test_p2_a_step_in_which_no_gradient_has_been_seen_leaves_everything() -> None:
    """The reference has decayed sums and moments by then, and counts no step."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = Prodigy([parameter], weight_decay=0.1)
    for _ in range(2):
        parameter.grad = torch.zeros(4)
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(4))
    assert optimizer.param_groups[0]["k"] == 0 and optimizer.skipped_steps == 0
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 1 and bool((parameter < 1).all())


@pytest.mark.parametrize("quirks", [True, False])
def test_p3_in_bf16_the_references_sums_stall(quirks: bool) -> None:
    """It keeps p0 and s in the dtype of the weights; without quirks they are fp32."""
    start = initial_weights(SHAPES, dtype=torch.bfloat16)
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = Prodigy(list(parameters.values()), d0=D0, reference_quirks=quirks)
    set_grads(parameters, next(gradient_sequence(SHAPES, 1, dtype=torch.bfloat16)))
    optimizer.step()
    expected = torch.bfloat16 if quirks else torch.float32
    assert {optimizer.state[p][name].dtype for p in parameters.values() for name in ("p0", "s")} == {expected}


def test_p4_coupled_decay_leaves_the_gradient_as_it_is() -> None:
    """The reference adds it to the gradient in place: whoever reads that afterwards reads the sum."""
    ours, optimizer, theirs, reference = pair(d0=D0, weight_decay=0.1, decouple=False)
    gradients = next(gradient_sequence(SHAPES, 1))
    for parameters in (ours, theirs):
        set_grads(parameters, gradients)
    optimizer.step()
    reference.step()

    def unchanged(name: str, parameter: nn.Parameter) -> bool:
        gradient = gradients[name]
        assert gradient is not None and parameter.grad is not None
        return torch.equal(parameter.grad, gradient)

    assert all(unchanged(name, parameter) for name, parameter in ours.items())
    assert not all(unchanged(name, parameter) for name, parameter in theirs.items())


def d_of_ranks(layout: str, reference: bool) -> list[float]:
    # All even, for on others it raises.
    shapes: NamedShapes = [("wide", (48, 64)), ("tall", (64, 48))]
    parameters = shard_parameters(initial_weights(shapes), LAYOUTS[layout])
    if reference:
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = prodigyopt.Prodigy(list(parameters.values()), d0=D0)
    else:
        optimizer = Prodigy(list(parameters.values()), d0=D0)
    for gradients in gradient_sequence(shapes, 8):
        set_grads(parameters, gradients)
        optimizer.step()
    return [float(group["d"]) for group in optimizer.param_groups]


@pytest.mark.dist
def test_p5_where_the_reference_has_another_d_on_each_rank_there_is_one() -> None:
    (alone,) = d_of_ranks("single", False)
    ours, theirs = (run(2, d_of_ranks, "fsdp_2", reference) for reference in (False, True))
    assert ours[0] == ours[1] == [pytest.approx(alone, rel=1e-6)]
    assert theirs[0] != theirs[1]


def test_a_step_in_the_backward_pass_is_refused_with_the_way_out() -> None:
    """There every parameter would be written before the others' sums are there."""
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"needs ProdigyPlusScheduleFree\(..., fused_back_pass=True\)"):
        step_in_backward(model, Prodigy(model.parameters()))  # type: ignore[arg-type]


def test_a_limit_of_growth_holds_once_d_has_left_d0() -> None:
    parameters = {name: nn.Parameter(value.clone()) for name, value in initial_weights(SHAPES).items()}
    optimizer = Prodigy(list(parameters.values()), d0=D0, growth_rate=1.05)
    d: list[float] = []
    for gradients in gradient_sequence(SHAPES, 12):
        set_grads(parameters, gradients)
        optimizer.step()
        d += optimizer.get_d()
    left = [value for value in d if value > D0]
    assert all(after <= before * 1.05 * (1 + 1e-9) for before, after in zip(left, left[1:], strict=False))
    assert len(left) > 9 and left[-1] > left[0] and optimizer.get_d_estimate() == d[-1]
