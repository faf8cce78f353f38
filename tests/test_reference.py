"""Parity with prodigy-plus-schedule-free 2.0.1 on one device."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.harness.models import D0, NamedShapes, gradient_sequence, initial_weights, named_shapes
from tests.reference import close, make_reference, quiet_step
from tests.runs import SINGLE, difference, make_optimizer, open_loop
from tests.switches import ALONE, TOGETHER, Switch

SHAPES = named_shapes("single_process")
# In a tensor of one element nothing is orthogonal to the weights: the reference blows rounding noise up to full size.
MORE_THAN_ONE = [(name, shape) for name, shape in SHAPES if torch.Size(shape).numel() > 1]
NUMBERS = ("d", "d_numerator", "d_denom", "effective_lr", "weight_sum", "k")
REFERENCE: dict[str, Switch] = ALONE | TOGETHER

UNSTABLE = {
    "d_limiter": 5,
    "d_coef": 12,
}
"""Without an effective limit d multiplies rounding errors from step to step; so many steps are comparable."""


def shapes_for(switch: Switch) -> NamedShapes:
    return MORE_THAN_ONE if switch.get("use_orthograd") else SHAPES


def parameters(shapes: NamedShapes, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(w) for name, w in initial_weights(shapes, dtype=dtype).items()}


def give(params: dict[str, nn.Parameter], gradients: dict[str, Tensor | None]) -> None:
    for name, p in params.items():
        g = gradients[name]
        p.grad = None if g is None else g.clone()


def sometimes_missing(step: int, name: str) -> bool:
    return name == "short" or (name == "wide" and step < 2) or (name == "vector" and step == 3)


@pytest.mark.parametrize("name", REFERENCE)
def test_each_step_is_the_references(name: str) -> None:
    """Lock-step: before each step, our optimizer takes over the reference's state and weights."""
    switch = REFERENCE[name]
    shapes = shapes_for(switch)
    theirs = parameters(shapes)
    reference = make_reference(theirs, 3, **switch)
    for step, gradients in enumerate(gradient_sequence(shapes, 7, missing=sometimes_missing)):
        ours = {key: nn.Parameter(p.detach().clone()) for key, p in theirs.items()}
        optimizer = make_optimizer(ours, 3, **switch)
        if step > 0:
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        give(theirs, gradients)
        give(ours, gradients)
        late = name.startswith("adopt") or "adopt" in name
        if late and step == 2:
            # A parameter that joins ADOPT late: the reference divides by an empty moment (docs/differences.md, O7).
            theirs["wide"].grad = ours["wide"].grad = None
        if late and step > 2:
            theirs["wide"].grad = ours["wide"].grad = None
        quiet_step(reference)
        optimizer.step()
        optimizer.get_d()
        for a, b in zip(optimizer.param_groups, reference.param_groups, strict=True):
            for key in NUMBERS:
                # The reference sums the numerator, whose terms cancel, in fp32.
                relative = 5e-6 if key == "d_numerator" else 1e-6
                assert a[key] == pytest.approx(b[key], rel=relative), (step, key)
        for key, p in theirs.items():
            assert close(ours[key], p.detach()), (step, key, "weights")
            mine = optimizer.state.get(ours[key], {})
            for entry, expected in reference.state.get(p, {}).items():
                if isinstance(expected, Tensor) and entry != "p0":
                    assert close(mine[entry].reshape(expected.shape), expected), (step, key, entry)
                elif entry == "p0":
                    assert torch.equal(mine["p0"], expected.expand_as(mine["p0"])), (step, key, entry)


@pytest.mark.parametrize("name", ["default", "speed"])
def test_fp64_weights_have_the_references_numbers(name: str) -> None:
    """Sums are rounded to bf16 only where the reference keeps the samples in it."""
    switch = REFERENCE[name]
    ours, theirs = (parameters(SHAPES, torch.float64) for _ in range(2))
    optimizer, reference = make_optimizer(ours, **switch), make_reference(theirs, **switch)
    for gradients in gradient_sequence(SHAPES, 10, dtype=torch.float64):
        give(ours, gradients)
        give(theirs, gradients)
        optimizer.step()
        quiet_step(reference)
        (a,), (b,) = optimizer.param_groups, reference.param_groups
        assert [a[key] for key in NUMBERS] == pytest.approx([b[key] for key in NUMBERS], rel=1e-6)
    for key, p in theirs.items():
        # Our arithmetic is fp32 whatever the weights.
        assert close(ours[key].float(), p.detach().float(), relative=1e-5), key


@pytest.mark.parametrize("name", REFERENCE)
def test_a_run_is_the_references(name: str) -> None:
    """Open loop: the same fixed gradients into both."""
    switch = REFERENCE[name]
    shapes, steps = shapes_for(switch), UNSTABLE.get(name, 25)
    ours = open_loop(SINGLE, shapes, steps, groups=2, **switch)
    theirs = parameters(shapes)
    reference = make_reference(theirs, 2, **switch)
    d = []
    for gradients in gradient_sequence(shapes, steps):
        give(theirs, gradients)
        quiet_step(reference)
        d.append([group["d"] for group in reference.param_groups])
    expected = copy.copy(ours)
    expected.weights = {key: p.detach() for key, p in theirs.items()}
    expected.groups = [[{"d": value} for value in values] for values in d]
    apart = difference(ours, expected)
    if apart["d"] <= 1e-6 and apart["weights"] <= 1e-5:
        return
    # What a rounding error in the gradients does to one process bounds what another order of summation may do.
    noise = difference(open_loop(SINGLE, shapes, steps, groups=2, noisy=True, **switch), ours)
    assert apart["d"] <= max(1e-6, 3 * noise["d"]), (apart, noise)
    assert apart["weights"] <= max(1e-5, 3 * noise["weights"]), (apart, noise)
    assert noise["d"] <= 1e-3, "the comparison says nothing if rounding noise moves d like this"


@pytest.mark.parametrize("name", ["default", "speed", "unfactored", "momentum", "no_stableadamw"])
def test_each_bf16_step_is_the_references(name: str) -> None:
    """Lock-step, with rounding to nearest: the two then differ where a sum in another order crosses a midpoint."""
    switch = {**REFERENCE[name], "stochastic_rounding": False}
    theirs = parameters(SHAPES, torch.bfloat16)
    reference = make_reference(theirs, 2, **switch)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 8, dtype=torch.bfloat16)):
        before = {key: p.detach().clone() for key, p in theirs.items()}
        ours = {key: nn.Parameter(p.clone()) for key, p in before.items()}
        optimizer = make_optimizer(ours, 2, **switch)
        if step > 0:
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        give(theirs, gradients)
        give(ours, gradients)
        quiet_step(reference)
        optimizer.step()
        optimizer.get_d()
        for a, b in zip(optimizer.param_groups, reference.param_groups, strict=True):
            for key in ("d_numerator", "d_denom"):
                assert a[key] == pytest.approx(b[key], rel=2**-7), (step, key)
        for key, p in theirs.items():
            size = p.detach().float().abs()
            # One unit of bf16 in the weight, and one in the 16-bit second moment that its step is divided by.
            unit = torch.finfo(torch.bfloat16).eps * (size + (p.detach() - before[key]).float().abs())
            apart = (ours[key].detach().float() - p.detach().float()).abs()
            assert bool((apart <= unit).all()), (step, key, float((apart / unit).max()))
            # From a zero start all steps have few sizes, so a midpoint between two weights is crossed by many at once.
            assert int((apart > 0).sum()) <= max(1, apart.numel() // 50), (step, key)


def test_sixteen_bit_factors() -> None:
    """The moments are the reference's bits; the denominator is formed from them in fp32 (docs/differences.md, O29)."""
    switch = {"factored_fp32": False, "stochastic_rounding": False}
    shapes = named_shapes("matrices")
    theirs, ours = parameters(shapes, torch.bfloat16), parameters(shapes, torch.bfloat16)
    reference, optimizer = make_reference(theirs, **switch), make_optimizer(ours, **switch)
    gradients = next(gradient_sequence(shapes, 1, dtype=torch.bfloat16))
    give(theirs, gradients)
    give(ours, gradients)
    quiet_step(reference)
    optimizer.step()
    for key, p in theirs.items():
        for entry in ("exp_avg_sq_row", "exp_avg_sq_col"):
            expected = reference.state[p][entry]
            assert torch.equal(optimizer.state[ours[key]][entry].to(expected.dtype), expected)


def closed_loop(optimizer_of: Any, steps: int) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10))
    optimizer = optimizer_of(dict(model.named_parameters()))
    inputs, targets = torch.randn(128, 20), torch.randint(0, 10, (128,))
    losses, d = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        quiet_step(optimizer)
        losses.append(float(loss.detach()))
        d.append(optimizer.param_groups[0]["d"])
    return losses, d


@pytest.mark.parametrize("name", ["default", "speed", "unfactored", "cautious", "orthograd", "momentum", "atan2"])
def test_training_is_the_references(name: str) -> None:
    switch = REFERENCE[name]
    losses, d = closed_loop(lambda p: make_optimizer(p, **{**switch, "d0": 1e-4}), 20)
    expected_losses, expected_d = closed_loop(lambda p: make_reference(p, **{**switch, "d0": 1e-4}), 20)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert d == pytest.approx(expected_d, rel=5e-6)
    assert d[-1] > d[0]


BOOLEANS = (
    "weight_decay_by_lr", "split_groups", "factored", "use_bias_correction", "use_stableadamw", "use_schedulefree",
    "use_speed", "use_cautious", "use_grams", "use_adopt", "use_orthograd", "use_focus",
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries({name: st.booleans() for name in BOOLEANS}),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([1e-8, None]),
    st.sampled_from([0, 3]),
    st.sampled_from([0, 20.0]),
)
def test_random_combinations(
    booleans: dict[str, bool], weight_decay: float, eps: float | None, prodigy_steps: int, schedulefree_c: float
) -> None:
    switch: Switch = {
        **booleans, "weight_decay": weight_decay, "eps": eps, "prodigy_steps": prodigy_steps,
        "schedulefree_c": schedulefree_c,
    }  # fmt: skip
    if switch["use_cautious"] and not switch["use_schedulefree"]:
        switch["use_cautious"] = False  # The reference drops the mask here (docs/differences.md, O5).
    shapes = named_shapes("matrices") + [("vector", (40,)), ("conv", (32, 3, 3, 3))]
    theirs, ours = parameters(shapes), parameters(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference, optimizer = make_reference(theirs, 2, **switch), make_optimizer(ours, 2, **switch)
    for gradients in gradient_sequence(shapes, 6):
        give(theirs, gradients)
        give(ours, gradients)
        quiet_step(reference)
        optimizer.step()
    for a, b in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert a["d"] == pytest.approx(b["d"], rel=1e-5)
        assert a["k"] == b["k"]
    for key, p in theirs.items():
        # Signs of numbers near zero may fall either way in FOCUS and in masks: such elements must be few.
        apart = (ours[key].detach() - p.detach()).abs()
        moved = float((p.detach() - initial_weights(shapes)[key]).abs().max())
        far = apart > 1e-4 * moved + 2 * torch.finfo(torch.float32).eps * p.detach().abs().max()
        assert float(far.float().mean()) <= 1e-3, key


def test_lr_schedules_and_paused_groups() -> None:
    theirs, ours = parameters(SHAPES), parameters(SHAPES)
    reference, optimizer = make_reference(theirs, 3), make_optimizer(ours, 3)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 20)):
        for groups in (reference.param_groups, optimizer.param_groups):
            groups[0]["lr"] = step / 20
            groups[1]["lr"] = 0.0
            groups[2]["lr"] = 1 - step / 20
        give(theirs, gradients)
        give(ours, gradients)
        quiet_step(reference)
        optimizer.step()
    for a, b in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for key in NUMBERS:
            assert a[key] == pytest.approx(b[key], rel=1e-6), key
    for key, p in theirs.items():
        assert close(ours[key].detach(), p.detach(), relative=1e-5), key


def test_d0_is_where_d_starts() -> None:
    optimizer = make_optimizer(parameters(SHAPES))
    assert optimizer.get_d() == [D0]
