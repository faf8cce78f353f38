"""What this does where the reference does something odd: one test for each row of ``docs/differences.md``.

The rows about a whole run, a checkpoint or several ranks are tested where those are; the table names the tests.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree
from tests.reference import make_reference, quiet_step
from tests.runs import make_optimizer

D = 1e-2
BETA1, BETA2 = 0.9, 0.99
EPS = 1e-8
GROWTH = 2**0.25
ROOT = Path(__file__).parent.parent
PLAIN: dict[str, Any] = {"d0": D, "prodigy_steps": 1, "use_stableadamw": False, "factored": False}
"""d stays at D and nothing scales the direction, so that a step can be written out."""


def gradients(count: int, shape: tuple[int, ...] = (48,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) * 4**step for step in range(count)]


def start(shape: tuple[int, ...] = (48,), dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))


def one(p: nn.Parameter, **switches: Any) -> ProdigyPlusScheduleFree:
    return make_optimizer({"p": p}, **switches)


def step(optimizer: Any, p: nn.Parameter, gradient: Tensor) -> None:
    p.grad = gradient.clone().to(p.dtype)
    quiet_step(optimizer)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=2e-6, atol=2e-7)


# ---- reproduced by default, left with reference_quirks=False ----


def test_o1_the_starting_point_is_exact() -> None:
    p = start((110,))
    initial = p.detach().clone()
    # Along the rounding error of the samples, which is all that the reference can see in the first step.
    gradient = initial.bfloat16().float() - initial
    optimizer = one(p, reference_quirks=False)
    step(optimizer, p, gradient)
    assert optimizer.state[p]["p0"].dtype == torch.float32
    assert torch.equal(optimizer.state[p]["p0"], initial[::11])
    optimizer.get_d()
    assert optimizer.param_groups[0]["d_numerator"] == 0

    q = nn.Parameter(initial.clone())
    optimizer = one(q)
    step(optimizer, q, gradient)
    optimizer.get_d()
    assert optimizer.state[q]["p0"].dtype == torch.bfloat16
    assert optimizer.param_groups[0]["d_numerator"] > 0


@pytest.mark.parametrize(("quirks", "expected"), [(False, (0.999**0.5) ** 100), (True, 1.0)])
def test_o2_the_sum_of_gradients_decays(quirks: bool, expected: float) -> None:
    p = start((110,))
    optimizer = one(p, betas=(BETA1, 0.999), reference_quirks=quirks)
    step(optimizer, p, torch.ones(110))
    first = optimizer.state[p]["s"].float().clone()
    for _ in range(100):
        step(optimizer, p, torch.zeros(110))
    torch.testing.assert_close(optimizer.state[p]["s"].float() / first, torch.full((10,), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(64, 48), (64, 8, 32)])
def test_o3_rows_are_divided_by_their_mean(shape: tuple[int, ...]) -> None:
    """Both shapes have dc > dr = 0. Adafactor: sqrt(R / mean(R over dc) * C)."""
    dc = len(shape) - 1
    (gradient,) = gradients(1, shape)
    square = (1 - BETA2) * D**2 * gradient**2
    row, col = square.mean(0, keepdim=True), square.mean(dc, keepdim=True)

    def z_after(axis: int) -> Tensor:
        denominator = torch.sqrt(row / (row.mean(axis, keepdim=True) + 1e-30) * col)
        return -D * D * gradient / (denominator + D * EPS)

    for quirks, axis in ((False, dc), (True, dc - 1)):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = one(p, **{**PLAIN, "factored": True, "reference_quirks": quirks})
        step(optimizer, p, gradient)
        torch.testing.assert_close(optimizer.state[p]["z"], z_after(axis), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("d_coef", [0.5, 2.0])
def test_o4_the_limit_holds_for_the_estimate_with_its_coefficient(d_coef: float) -> None:
    p = nn.Parameter(torch.zeros(110))
    optimizer = one(p, d0=1e-6, d_coef=d_coef, reference_quirks=False)
    group = optimizer.param_groups[0]
    kinds = set()
    for _ in range(30):
        before = optimizer.get_d()[0]
        # Ahead, then back: d grows by its limit, then by its estimate, then not at all.
        step(optimizer, p, torch.ones(110) if group["k"] < 12 else -torch.ones(110))
        d = optimizer.get_d()[0]
        estimate = d_coef * group["d_numerator"] / group["d_denom"]
        assert d == pytest.approx(max(before, min(GROWTH * before, estimate)), rel=1e-12)
        kinds.add("limit" if d == pytest.approx(GROWTH * before, rel=1e-9) else "same" if d == before else "estimate")
    assert {"limit", "same"} <= kinds


def test_o4_by_default_a_small_coefficient_never_grows() -> None:
    for quirks in (True, False):
        p = nn.Parameter(torch.zeros(110))
        optimizer = one(p, d0=1e-6, d_coef=0.5, reference_quirks=quirks)
        for _ in range(30):
            step(optimizer, p, torch.ones(110))
        assert (optimizer.get_d()[0] > 1e-6) != quirks


def adopt_directions(sequence: list[Tensor]) -> list[Tensor]:
    """``clip(g / max(sqrt(v), eps), k^(1/4))`` in units of d, with v of the step before (arXiv:2411.02853)."""
    moment = D**2 * sequence[0] ** 2
    directions = []
    for k, g in enumerate(sequence[1:], start=2):
        bound = k**0.25
        directions.append((D * g / (moment.sqrt() + D * EPS)).clamp(-bound, bound))
        moment = BETA2 * moment + (1 - BETA2) * D**2 * g**2
    return directions


def test_o6_adopt_with_momentum_is_the_papers() -> None:
    sequence = gradients(5)
    p = start()
    expected, momentum = p.detach().clone(), torch.zeros(48)
    optimizer = one(p, **PLAIN, use_schedulefree=False, use_adopt=True, reference_quirks=False)
    step(optimizer, p, sequence[0])
    assert torch.equal(p.detach(), expected)
    clipped = 0
    for k, (g, n) in enumerate(zip(sequence[1:], adopt_directions(sequence), strict=True), start=2):
        momentum = BETA1 * momentum + (1 - BETA1) * n
        expected = expected - D * momentum
        clipped += int((n.abs() == torch.tensor(k**0.25)).sum())
        step(optimizer, p, g)
        near(p, expected)
    assert clipped > 0


def test_o7_adopt_clips_its_direction() -> None:
    sequence = gradients(5)
    p = start()
    z = p.detach().clone()
    optimizer = one(p, **PLAIN, use_adopt=True, reference_quirks=False)
    default = one(q := start(), **PLAIN, use_adopt=True)
    step(optimizer, p, sequence[0])
    step(default, q, sequence[0])
    for k, (g, u) in enumerate(zip(sequence[1:], adopt_directions(sequence), strict=True), start=2):
        before = default.state[q]["z"].clone()
        step(optimizer, p, g)
        step(default, q, g)
        z = z - D * u
        near(optimizer.state[p]["z"], z)
        assert float((default.state[q]["z"] - before).abs().max()) > 2 * D * k**0.25


@pytest.mark.parametrize("schedulefree", [True, False])
def test_o8_focus_averages_the_weights_themselves(schedulefree: bool) -> None:
    p = start()
    optimizer = one(p, **PLAIN, use_focus=True, use_schedulefree=schedulefree, reference_quirks=False)
    average, momentum = torch.zeros(48), torch.zeros(48)
    for t, g in enumerate(gradients(5), start=1):
        w = (optimizer.state[p]["z"] if schedulefree and t > 1 else p.detach()).clone()
        average = BETA2 * average + (1 - BETA2) * w
        momentum = BETA1 * momentum + (1 - BETA1) * D * g
        step(optimizer, p, g)
        near(optimizer.state[p]["exp_avg_sq"], average)
        if t == 1:
            # The average of one value is that value: what is left of their difference is rounding.
            continue
        difference = w - average / (1 - BETA2**t)
        settled = difference.abs() > 1e-5
        assert int(settled.sum()) > 40
        u = (g if schedulefree else momentum).sign() + 0.1 * difference.sign()
        after = optimizer.state[p]["z"] if schedulefree else p.detach()
        near(after[settled], (w - D * u)[settled])


def test_o24_evaluation_does_not_wear_bf16_weights() -> None:
    worn = {}
    for quirks in (True, False):
        p = start((4000,), torch.bfloat16)
        optimizer = one(p, d0=D, reference_quirks=quirks)
        for g in gradients(5, (4000,)):
            step(optimizer, p, g)
        before = p.detach().clone()
        for _ in range(5):
            optimizer.eval()
            optimizer.train()
        worn[quirks] = int((p.detach() != before).sum())
    assert worn[False] == 0 < worn[True]


# ---- never reproduced ----


@pytest.mark.parametrize("quirks", [True, False])
def test_o5_cautious_masks_the_momentum(quirks: bool) -> None:
    p = start()
    expected = p.detach().clone()
    optimizer = one(p, **PLAIN, use_schedulefree=False, use_cautious=True, reference_quirks=quirks)
    momentum, moment = torch.zeros(48), torch.zeros(48)
    masked = 0
    for g in gradients(4):
        momentum = BETA1 * momentum + (1 - BETA1) * D * g
        moment = BETA2 * moment + (1 - BETA2) * D**2 * g**2
        mask = (g * momentum > 0).float()
        masked += int((mask == 0).sum())
        expected = expected - D * momentum * mask / mask.mean().clamp_min(1e-3) / (moment.sqrt() + D * EPS)
        step(optimizer, p, g)
        near(p, expected)
    assert masked > 0


def test_o5_cautious_descends_where_the_reference_climbs() -> None:
    ours, theirs = nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(40))
    switches: dict[str, Any] = {"use_schedulefree": False, "use_cautious": True}
    optimizer, reference = one(ours, **switches), make_reference({"p": theirs}, **switches)
    for p, of_p in ((ours, optimizer), (theirs, reference)):
        for _ in range(3):
            step(of_p, p, -torch.ones(40))
    assert bool((ours > 0).all())
    assert bool((theirs < 0).all())


@pytest.mark.parametrize("quirks", [True, False])
@pytest.mark.parametrize("schedulefree", [True, False])
def test_o7_a_parameter_that_joins_adopt_late_begins_as_the_others_did(schedulefree: bool, quirks: bool) -> None:
    early, late = start(), start()
    before = late.detach().clone()
    optimizer = make_optimizer(
        {"early": early, "late": late}, **PLAIN, use_adopt=True, use_schedulefree=schedulefree, reference_quirks=quirks
    )
    for k in range(1, 6):
        early.grad = torch.ones(48)
        late.grad = torch.ones(48) if k >= 4 else None
        optimizer.step()
        if k == 4:
            assert torch.equal(late.detach(), before)
            near(optimizer.state[late]["exp_avg_sq"], torch.full((48,), D**2))
    reached = float((late.detach() - before).abs().max())
    # The gradient over the root of its own square is 1, clamped or not: no more than a step of length d.
    assert 0 < reached <= D * (1 + 1e-5)


def test_o9_steps_are_counted_where_a_parameter_never_has_a_gradient() -> None:
    used, unused = start(), start()
    optimizer = make_optimizer({"used": used, "unused": unused}, fused_back_pass=True)
    counts = []
    for g in gradients(4):
        used.grad = g
        optimizer.step_param(used)
        optimizer.step()
        counts.append(optimizer.param_groups[0]["k"])
    assert counts == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("dtype", "entry", "expected"),
    [
        (torch.float32, "p0", torch.bfloat16),
        (torch.float32, "s", torch.bfloat16),
        (torch.bfloat16, "exp_avg_sq_row", torch.float32),
        (torch.bfloat16, "exp_avg_sq_col", torch.float32),
    ],
)
def test_o10_loading_keeps_the_dtypes_of_state(dtype: torch.dtype, entry: str, expected: torch.dtype) -> None:
    p = start((40, 36), dtype)
    (gradient,) = gradients(1, (40, 36))
    optimizer, reference = one(p), make_reference({"p": (q := start((40, 36), dtype))})
    for of_p, param in ((optimizer, p), (reference, q)):
        step(of_p, param, gradient)
        assert of_p.state[param][entry].dtype == expected
    kept = optimizer.state[p][entry].clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    reference.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert optimizer.state[p][entry].dtype == expected
    assert torch.equal(optimizer.state[p][entry], kept)
    assert reference.state[q][entry].dtype == dtype


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_o18_one_element_has_no_orthogonal_direction(shape: tuple[int, ...]) -> None:
    moved = {}
    for orthograd in (True, False):
        p = nn.Parameter(torch.full(shape, 0.7))
        optimizer = one(p, d0=D, use_orthograd=orthograd)
        for _ in range(3):
            step(optimizer, p, torch.full(shape, 0.3))
        moved[orthograd] = p.detach().clone()
    assert torch.equal(moved[True], moved[False])
    assert bool((moved[True] < 0.7).all())


def test_o18_memory_format_does_not_matter() -> None:
    shape = (8, 40, 3, 3)
    contiguous = start(shape)
    channels_last = nn.Parameter(contiguous.detach().clone().to(memory_format=torch.channels_last))
    first, second = one(contiguous, use_orthograd=True), one(channels_last, use_orthograd=True)
    for g in gradients(3, shape):
        step(first, contiguous, g)
        step(second, channels_last, g)
    near(channels_last, contiguous.detach())
    assert first.get_d() == pytest.approx(second.get_d(), rel=1e-6)


def test_o25_rounding_keeps_large_weights_finite() -> None:
    largest = torch.finfo(torch.bfloat16).max
    p = nn.Parameter(torch.full((200,), largest, dtype=torch.bfloat16))
    # The first step grows the weights by a third of a unit, beyond what bf16 but not what fp32 holds.
    unit, first_direction = largest / 255, 1 / math.sqrt(1 - BETA2)
    optimizer = one(p, **{**PLAIN, "d0": 1.0, "lr": unit / 3 / first_direction})
    for _ in range(4):
        step(optimizer, p, -torch.ones(200))
    assert bool((p == largest).all())
    assert bool((optimizer.state[p]["z"] == largest).all())


def test_o15_a_group_with_lr_zero_adapts_and_decays() -> None:
    results = []
    for build in (make_optimizer, make_reference):
        p = start((110,))
        before = p.detach().clone()
        optimizer = build({"p": p}, d0=1e-6, weight_decay=0.01, weight_decay_by_lr=False)
        optimizer.param_groups[0]["lr"] = 0.0
        for g in gradients(10, (110,)):
            step(optimizer, p, g)
        assert optimizer.param_groups[0]["d"] > 1e-6
        assert float(p.detach().norm()) < float(before.norm())
        results.append((optimizer.param_groups[0]["d"], p.detach()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    near(results[0][1], results[1][1])


def test_o28_very_small_gradients_make_smaller_steps() -> None:
    (gradient,) = gradients(1, (40, 40))
    moved: dict[float, list[float]] = {}
    for scale in (1.0, 1e-9):
        for build in (make_optimizer, make_reference):
            p = nn.Parameter(torch.zeros(40, 40))
            optimizer = build({"p": p}, d0=1e-6)
            step(optimizer, p, gradient * scale)
            moved.setdefault(scale, []).append(float(optimizer.state[p]["z"].norm()))
    for ours, theirs in moved.values():
        assert ours == pytest.approx(theirs, rel=2e-6)
    assert moved[1e-9][0] < moved[1.0][0] / 10
