"""The numbers between the passes in C++ and by Triton against those that torch computes, for groups and for parameters.

Triton interprets, which it does on ranks of the pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppsf_dist
from ppsf_dist.engine.fast_numbers import NumbersOfParameters
from ppsf_dist.engine.group_numbers import OF_THE_STEP, GroupNumbers
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.part_numbers import PartNumbers, Verdict
from ppsf_dist.engine.reductions import Outcome
from ppsf_dist.kernels.choice import ChosenKernels
from ppsf_dist.kernels.codes import KNOWN
from ppsf_dist.kernels.cpu.numbers import NATIVE_NUMBERS
from ppsf_dist.kernels.interface import Scales
from ppsf_dist.kernels.numbers import FAST_NUMBERS, FastNumbers, NumbersKernels, Options
from ppsf_dist.methods.adamw_schedulefree import ADAMW_METHOD, RADAM_METHOD
from ppsf_dist.methods.base import AVERAGING, Cause, Method, StepNumbers, Total
from ppsf_dist.methods.prodigy import PRODIGY
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from ppsf_dist.methods.sgd_schedulefree import SGD_METHOD
from ppsf_dist.methods.sums import Stat
from ppsf_dist.state.inventory import PARAMETER_NUMBERS
from tests.harness.kernels import interpreted
from tests.harness.kernels import kernels as kernels_of
from tests.harness.pool import run
from tests.kernels.drawn import COVERED, CPU, METHODS, Part, groups_of, signed

Comparison = Callable[[str, st.DataObject, str], None]


def close(native: Tensor, torchs: Tensor, digits: float = 1e-12) -> None:
    """Powers are products or roots in C++: of a thousand factors some last places."""
    torch.testing.assert_close(native, torchs, rtol=digits, atol=0, equal_nan=True)


def digits_of(method: Method, of: list[dict[str, Any]]) -> float:
    """Some last places, and what the last place of ``beta2^k`` moves RAdam's rectification by.

    In its first steps that is a small difference of large numbers: ``rho - 4`` of ``2 k beta2^k / (1 - beta2^k)``.
    """
    rectified = [group for group in of if method is RADAM_METHOD or group.get("use_bias_correction")]
    if method not in (RADAM_METHOD, PRODIGY_PLUS) or not rectified:
        return 1e-12
    steps = torch.tensor([group["k"] + (method is RADAM_METHOD) for group in rectified], dtype=torch.float64)
    beta2 = torch.tensor([group["betas"][1] for group in rectified], dtype=torch.float64)
    grown = beta2**steps
    rho = 2 / (1 - beta2) - 1 - 2 * steps * grown / (1 - grown)
    moved = torch.finfo(torch.float64).eps * 2 * steps * grown / (1 - grown) ** 2 / (rho - 4)
    apart = float(torch.where(rho > 4, moved, 0.0).max())
    assert apart < 1e-10
    return max(1e-12, apart)


def in_fp32(native: Tensor, torchs: Tensor) -> None:
    """Equal, or neighbours where the numbers in fp64 lie on two sides of a boundary."""
    torch.testing.assert_close(native, torchs, rtol=2**-23, atol=0, equal_nan=True)


def kernels_by_name(backend: str) -> NumbersKernels:
    if backend == "native":
        return NATIVE_NUMBERS
    from ppsf_dist.kernels.triton.step_numbers import TRITON_NUMBERS

    return TRITON_NUMBERS


def both(name: str, of: list[dict[str, Any]], backend: str) -> tuple[FastNumbers, StepNumbers]:
    """The numbers of a step by kernels and by torch, each with numbers of groups of its own."""
    method = METHODS[name]
    fast = FAST_NUMBERS[method.step_numbers]
    assert fast.computes(of)
    ours, theirs = (GroupNumbers(method, of, HostAccess(CPU)) for _ in range(2))
    fast_step = fast(ours, of, 3, kernels=kernels_by_name(backend), method=method)
    return fast_step, method.step_numbers(theirs, of, 3)


def test_its_rows_are_those_of_the_methods() -> None:
    """The orders that ``numbers.h`` and ``numbers_of_*.h`` know by heart."""
    of_the_step = ("gradient_norm", "update_norm", "cause", "failures")
    assert OF_THE_STEP == of_the_step
    assert AVERAGING == ("delta", "c", "q", "beta1", "weight_decay", "keep", "gain")
    assert KNOWN == ("k", "delta", "c", "q", "adapts", "speeds", "pauses", "moves", "unsound")
    assert Options._fields == (
        "pooled", "takes_mean", "averages_d", "quirks", "corrects", "speed", "adam", "radam",
    )  # fmt: skip
    assert PRODIGY_PLUS.hyper == (
        "lr", "beta1", "beta2", "beta3", "beta4", "growth_rate", "weight_decay", "d0", "d_coef", "eps", "prodigy_steps",
        "schedulefree_c", "gain_is_d", "momentum_of_d", "focus_fixed", "d_limiter", "use_speed", "use_bias_correction",
        "use_schedulefree", "weight_decay_by_lr",
    )  # fmt: skip
    assert tuple(PRODIGY_PLUS.numbers)[:9] == (
        "d", "d_prev", "d_numerator", "d_denom", "prev_d_numerator", "max_d_numerator", "weight_sum", "effective_lr",
        "shared_d",
    )  # fmt: skip
    assert PRODIGY_PLUS.coefficients == (
        *AVERAGING, "d", "d_eps", "momentum_weight", "beta2", "square_weight", "focus_correction", "clamp", "beta3",
        "s_weight",
    )  # fmt: skip
    assert FAST_NUMBERS[PRODIGY_PLUS.step_numbers].own == ("d", "beta2", "_weight", "_weight_sum")
    assert PRODIGY.hyper == (
        "lr", "beta1", "beta2", "beta3", "eps", "weight_decay", "use_bias_correction", "safeguard_warmup", "d0",
        "d_coef", "growth_rate",
    )  # fmt: skip
    assert tuple(PRODIGY.numbers)[:5] == FAST_NUMBERS[PRODIGY.step_numbers].own
    assert FAST_NUMBERS[PRODIGY.step_numbers].own == ("d", "d_max", "d_hat", "d_numerator", "d_denom")
    assert PRODIGY.coefficients == (
        *AVERAGING, "d_eps", "momentum_weight", "beta2", "square_weight", "beta3", "s_weight",
    )  # fmt: skip
    averages = ("lr", "beta1", "weight_decay", "r", "weight_lr_power", "warmup_steps")
    assert SGD_METHOD.hyper == averages
    assert ADAMW_METHOD.hyper == (*averages, "beta2", "eps")
    assert RADAM_METHOD.hyper == (*averages, "beta2", "eps", "silent_sgd_phase")
    for method in (SGD_METHOD, ADAMW_METHOD, RADAM_METHOD):
        assert tuple(method.numbers)[:4] == ("k", "weight_sum", "lr_max", "scheduled_lr")
        assert FAST_NUMBERS[method.step_numbers].own == ("_weight_sum", "_lr_max")
    assert RADAM_METHOD.coefficients == (*ADAMW_METHOD.coefficients, "root")
    assert ADAMW_METHOD.coefficients == (*SGD_METHOD.coefficients, "d_eps", "beta2", "square_weight")
    assert SGD_METHOD.coefficients == AVERAGING
    assert PARAMETER_NUMBERS == ("step", "exp_avg_x0_dot", "max_x0_minus_l1_norm", "max_x0_minus_l2_norm")
    assert [cause.name for cause in Cause] == ["NOTHING", "WEIGHTS", "GRADIENT", "NUMBER", "FAILURE"]
    assert [outcome.name for outcome in Outcome] == ["FAILED", "REPLANS", "UNSOUND"]
    assert Scales._fields == ("amount", "pull", "mask", "advance")
    assert len(Total) == 6 and len(Stat) == 12


@pytest.mark.parametrize("powers", [{"r": 1.5}, {"weight_lr_power": 0.5}, {"r": 2.0**41}])
def test_powers_that_are_no_whole_numbers_are_torchs(powers: dict[str, float]) -> None:
    """One such group is enough. Of whole numbers they are C++'s."""
    with kernels_of("native"):
        chosen, groups = ChosenKernels(), ppsf_dist.AdamWScheduleFree([torch.zeros(1)]).param_groups
    of_step = partial(chosen.step_numbers, ADAMW_METHOD, device=CPU, host_reads=True)
    assert of_step([*groups, groups[0] | powers]) is ADAMW_METHOD.step_numbers
    assert of_step([*groups, groups[0] | {name: 3.0 for name in powers}]) is not ADAMW_METHOD.step_numbers


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=200)
@given(st.data())
def test_groups(name: str, data: st.DataObject) -> None:
    """What a step begins and ends with, for every switch; also if it is void or a number is not finite."""
    compare_groups(name, data, "native")


def compare_groups(name: str, data: st.DataObject, backend: str) -> None:
    of, method = data.draw(groups_of(name)), METHODS[name]
    size = "d" if "d" in method.numbers else "weight_sum"
    broken = data.draw(st.sampled_from((None, None, None, size, "lr", "weight_decay")))
    if broken is not None:
        of[-1][broken] = data.draw(st.sampled_from((math.nan, math.inf)))
    fast, torchs = both(name, of, backend)
    assert fast.backend == backend
    for known in (
        "k",
        "delta",
        "c",
        "q",
        *(("d", "beta2", "_weight", "_weight_sum") if method is PRODIGY_PLUS else ()),
    ):
        close(getattr(fast, known), getattr(torchs, known), digits_of(method, of))
    assert int(fast.unsound) == int(torchs.unsound) and (int(fast.unsound) > 0) == (broken is not None)
    if method is PRODIGY_PLUS:
        assert (fast.adapts is None) == (torchs.adapts is None)
    if fast.adapts is not None and torchs.adapts is not None:
        assert fast.adapts.tolist() == torchs.adapts.tolist()
    in_fp32(fast.table(method.coefficients), torchs.table(method.coefficients))

    row = st.lists(st.one_of(signed, st.just(0.0)), min_size=len(of), max_size=len(of))
    totals = torch.tensor([data.draw(row) for _ in Total], dtype=torch.float64)
    totals[Total.DENOMINATOR :].abs_()
    # All ranks have heard of a number that is not finite.
    causes = [*Cause, 0, 0, 0, 0] if broken is None else [Cause.NUMBER, Cause.FAILURE]
    totals[Total.CAUSE] = data.draw(st.sampled_from(causes))
    if data.draw(st.booleans()):
        totals[Total.UPDATE_SQUARE, 0] = math.nan
    for numbers in (fast, torchs):
        numbers.learn(totals)
    if torchs.moves is not None:
        assert (fast.known[KNOWN.index("moves")] > 0).tolist() == torchs.moves.tolist()
    if torchs.moves is None or torchs.moves.all():
        in_fp32(fast.table(method.coefficients), torchs.table(method.coefficients))
    fast.commit(totals)
    torchs.commit(totals)
    for row_, here, there in zip(torchs._numbers.rows, fast.numbers.values, torchs._numbers.values, strict=True):
        assert torch.allclose(here, there, rtol=digits_of(method, of), atol=0, equal_nan=True), (row_, here, there)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=200)
@given(st.data())
def test_parameters(name: str, data: st.DataObject) -> None:
    """Coefficients, keys, scales, verdicts, contributions and gates, for every switch that C++ knows."""
    compare_parameters(name, data, "native")


def compare_parameters(name: str, data: st.DataObject, backend: str) -> None:
    of = data.draw(groups_of(name, COVERED))
    part = Part(METHODS[name], of, data)
    assert part.traits.are_common
    step, with_torch = both(name, of, backend)
    ours, theirs = part.buffers(), part.buffers()
    fast = NumbersOfParameters(part.parameters, part.traits, ours, part.reductions).of_step(step)
    torchs = PartNumbers(with_torch, part.parameters, part.traits, theirs)
    assert type(fast) is not PartNumbers
    if backend == "triton":
        assert list(step.told.rows.outcome._fields) == [outcome.name.lower() for outcome in Outcome]
    stats, host = part.reductions.table.stats, HostAccess(CPU)
    # Triton computes where the host does not read.
    host.free = backend == "native"
    for numbers in (fast, torchs):
        numbers.begin(part.moments)
        numbers.fill_scales(stats)
    in_fp32(ours.coefficients.table, theirs.coefficients.table)
    in_fp32(ours.scales, theirs.scales)
    assert ours.keys.tolist() == theirs.keys.tolist()
    here, there = (numbers.verdict(part.reductions, host) for numbers in (fast, torchs))
    assert here.active.tolist() == there.active.tolist()
    assert here.known == there.known and here.cause == there.cause
    for where in data.draw(st.lists(st.sampled_from(Stat), min_size=4, max_size=4)):
        kept = stats[0, where].item()
        stats[0, where] = math.nan
        assert fast.verdict(part.reductions, host).cause == torchs.verdict(part.reductions, host).cause, where
        stats[0, where] = kept
    endings = [here]
    if here.cause == Cause.GRADIENT:
        endings.append(here.with_cause(Cause.WEIGHTS))
    for ending in endings:
        made, expected = fast.contribution(stats, ending), torchs.contribution(stats, ending)
        close(made.parameters, expected.parameters)
        close(made.totals, expected.totals, 1e-9)
        assert fast.fill_gates(ending, host) == torchs.fill_gates(ending, host)
        assert ours.gates.moments.tolist() == theirs.gates.moments.tolist()
        assert ours.gates.weights.tolist() == theirs.gates.weights.tolist()
    if METHODS[name].d_timing == "current":
        compare_what_is_learned((step, fast, ours), (with_torch, torchs, theirs), part, here, host)


def compare_what_is_learned(ours: Any, theirs: Any, part: Part, verdict: Verdict, host: HostAccess) -> None:
    """Coefficients, scales and gates once the sums have made a d, and what all parts have found is known."""
    stats = part.reductions.table.stats
    for step, numbers, _ in (ours, theirs):
        step.learn(numbers.contribution(stats, verdict).totals)
        numbers.fill_coefficients()
        numbers.fill_scales(stats)
    if verdict.cause == Cause.NOTHING and theirs[0].moves.all():
        in_fp32(ours[2].coefficients.table, theirs[2].coefficients.table)
        in_fp32(ours[2].scales, theirs[2].scales)
    for cause in (verdict.cause, torch.full_like(verdict.cause, Cause.GRADIENT)):
        of_all = verdict._replace(cause=cause, known=None)
        assert ours[1].fill_gates(of_all, host) == theirs[1].fill_gates(of_all, host)
        assert ours[2].gates.moments.tolist() == theirs[2].gates.moments.tolist()
        assert ours[2].gates.weights.tolist() == theirs[2].gates.weights.tolist()


@pytest.mark.dist
@pytest.mark.parametrize("compare", [compare_groups, compare_parameters])
def test_by_triton(compare: Comparison) -> None:
    """Few at once: the fifth group and the ninth parameter are in a second round of a program, or a second program."""
    run(1, interpreted, _few_at_once, compare)


def _few_at_once(compare: Comparison) -> None:
    from ppsf_dist.engine import triton_numbers
    from ppsf_dist.kernels.triton import step_numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_numbers, "GROUPS_AT_ONCE", 4)
        patch.setattr(triton_numbers, "AT_ONCE", 8)
        for name in (PRODIGY_PLUS.name, *METHODS):
            _by_triton(compare, name)


@settings(max_examples=8, deadline=None, database=None, phases=[Phase.generate])
@given(st.data())
def _by_triton(compare: Comparison, name: str, data: st.DataObject) -> None:
    compare(name, data, "triton")
