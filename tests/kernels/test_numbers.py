"""The numbers between the passes in C++ and by Triton against those that torch computes, for groups and for parameters.

Triton interprets, which it does on ranks of the pool.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.engine.fast_numbers import NumbersOfParameters
from ppsf_dist.engine.group_numbers import GroupNumbers
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.part_numbers import PartNumbers, Traits
from ppsf_dist.engine.reductions import Outcome, Reductions
from ppsf_dist.kernels.cpu.numbers import NativeProdigyPlusNumbers
from ppsf_dist.kernels.interface import Buffers, Coefficients, Gates, Scales
from ppsf_dist.methods.base import Cause, Total
from ppsf_dist.methods.prodigy_plus import POOLED, PRODIGY_PLUS, ProdigyPlus, ProdigyPlusNumbers
from ppsf_dist.methods.sums import Stat
from ppsf_dist.sharding import Team
from ppsf_dist.sharding.slots import Slot, SlotTable
from ppsf_dist.state.inventory import PARAMETER_NUMBERS
from ppsf_dist.state.moments import FactoredMoments
from tests.harness.kernels import interpreted
from tests.harness.pool import run
from tests.switches import EVERY

CPU = torch.device("cpu")
WIDE = ("split_groups", "split_groups_mean", "reference_quirks")
SHAPES = ((16, 64), (7,), (40, 3), (), (5, 33, 2))

COVERED = {
    name: switch
    for name, switch in EVERY.items()
    if not {"use_adopt", "use_orthograd", "use_focus"} & {key for key, value in switch.items() if value is True}
}
"""The switches that the numbers of parameters know in C++."""

positive = st.floats(1e-8, 1e3)
signed = st.floats(-1e3, 1e3)


def close(native: Tensor, torchs: Tensor, digits: float = 1e-12) -> None:
    """Powers are products or roots in C++: of a thousand factors some last places."""
    torch.testing.assert_close(native, torchs, rtol=digits, atol=0, equal_nan=True)


def in_fp32(native: Tensor, torchs: Tensor) -> None:
    """Equal, or neighbours where the numbers in fp64 lie on two sides of a boundary."""
    torch.testing.assert_close(native, torchs, rtol=2**-23, atol=0, equal_nan=True)


@st.composite
def groups(draw: st.DrawFn, switches: dict[str, dict[str, Any]] = EVERY) -> list[dict[str, Any]]:
    """One to five validated groups with a switch each, and the numbers of some step."""
    some = st.sampled_from(sorted(switches))
    of_all = st.sampled_from(sorted(name for name, switch in switches.items() if {*WIDE} & {*switch}))
    first = switches[draw(st.one_of(some, of_all))]
    # What all groups must agree on is the first one's.
    shared = WIDE if first.get("split_groups", True) else (*WIDE, *POOLED)
    made: list[dict[str, Any]] = []
    for _ in range(draw(st.sampled_from((1, 2, 3, 5)))):
        other = switches[draw(some)] if made else first
        wide = {name: first[name] for name in shared if name in first}
        other = {name: value for name, value in other.items() if name not in shared} | wide
        if shared is WIDE and draw(st.booleans()):
            other["prodigy_steps"] = 5
        lr = draw(st.sampled_from((1.0, 0.5, 0.0)))
        made.append({"params": [torch.nn.Parameter(torch.zeros(2))], **other, "lr": lr})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of: list[dict[str, Any]] = ProdigyPlusScheduleFree(made).param_groups
    for group in of:
        group |= {
            "k": draw(st.sampled_from((1, 2, 3, 4, 5, 6, 30, 1000))),
            "d": group["d0"] * draw(st.sampled_from((1.0, 1.05, 40.0))),
            "weight_sum": draw(st.sampled_from((0.0, 1e-7, 3.0))),
            "d_numerator": draw(st.sampled_from((0.0, 1e-5, 1.0, -1.0))),
            "max_d_numerator": draw(st.sampled_from((0.0, 1e-5, 1.0))),
            "shared_d": draw(st.sampled_from((None, 1e-3))),
        }
    return of


def fast_numbers_of(backend: str) -> type[ProdigyPlusNumbers]:
    if backend == "native":
        return NativeProdigyPlusNumbers
    from ppsf_dist.kernels.triton.step_numbers import TritonProdigyPlusNumbers

    return TritonProdigyPlusNumbers


def both(of: list[dict[str, Any]], backend: str) -> tuple[ProdigyPlusNumbers, ProdigyPlusNumbers]:
    numbers = GroupNumbers(PRODIGY_PLUS, of, HostAccess(CPU))
    return fast_numbers_of(backend)(numbers, of, seed=3), ProdigyPlusNumbers(numbers, of, seed=3)


def test_its_rows_are_those_of_the_method() -> None:
    """The orders that ``numbers.h`` knows by heart."""
    assert PRODIGY_PLUS.hyper == (
        "lr", "beta1", "beta2", "beta3", "beta4", "growth_rate", "weight_decay", "d0", "d_coef", "eps", "prodigy_steps",
        "schedulefree_c", "gain_is_d", "momentum_of_d", "focus_fixed", "d_limiter", "use_speed", "use_bias_correction",
        "use_schedulefree", "weight_decay_by_lr",
    )  # fmt: skip
    numbers = GroupNumbers(PRODIGY_PLUS, ProdigyPlusScheduleFree([torch.zeros(1)]).param_groups, HostAccess(CPU))
    assert numbers.rows == (
        "d", "d_prev", "d_numerator", "d_denom", "prev_d_numerator", "max_d_numerator", "weight_sum", "effective_lr",
        "shared_d", "k", "skipped_steps", "gradient_norm", "update_norm", "cause", "failures",
    )  # fmt: skip
    assert ProdigyPlus.coefficients == (
        "delta", "c", "q", "beta1", "weight_decay", "keep", "gain", "d", "d_eps", "momentum_weight", "beta2",
        "square_weight", "focus_correction", "clamp", "beta3", "s_weight",
    )  # fmt: skip
    assert PARAMETER_NUMBERS == ("step", "exp_avg_x0_dot", "max_x0_minus_l1_norm", "max_x0_minus_l2_norm")
    assert [cause.name for cause in Cause] == ["NOTHING", "WEIGHTS", "GRADIENT", "NUMBER", "FAILURE"]
    assert [outcome.name for outcome in Outcome] == ["FAILED", "REPLANS", "UNSOUND"]
    assert Scales._fields == ("amount", "pull", "mask", "advance")
    assert len(Total) == 6 and len(Stat) == 12


@settings(max_examples=200)
@given(groups(), st.data())
def test_groups(of: list[dict[str, Any]], data: st.DataObject) -> None:
    """What a step begins and ends with, for every switch; also if it is void or a number is not finite."""
    compare_groups(of, data, "native")


@pytest.mark.dist
def test_groups_by_triton() -> None:
    """The fifth is in a second round of a program."""
    run(1, interpreted, _four_groups_at_once)


def _four_groups_at_once() -> None:
    from ppsf_dist.kernels.triton import step_numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_numbers, "GROUPS_AT_ONCE", 4)
        _groups_by_triton()


@settings(max_examples=30, deadline=None, database=None, phases=[Phase.generate])
@given(groups(), st.data())
def _groups_by_triton(of: list[dict[str, Any]], data: st.DataObject) -> None:
    compare_groups(of, data, "triton")


def compare_groups(of: list[dict[str, Any]], data: st.DataObject, backend: str) -> None:
    broken = data.draw(st.sampled_from((None, None, None, "d", "lr", "weight_decay")))
    if broken is not None:
        of[-1][broken] = data.draw(st.sampled_from((math.nan, math.inf)))
    native, torchs = both(of, backend)
    for name in ("k", "d", "delta", "c", "q", "beta2", "_weight", "_weight_sum"):
        close(getattr(native, name), getattr(torchs, name))
    assert native.backend == backend
    assert int(native.unsound) == int(torchs.unsound) == (broken is not None)
    assert (native.adapts is None) == (torchs.adapts is None)
    if native.adapts is not None and torchs.adapts is not None:
        assert native.adapts.tolist() == torchs.adapts.tolist()
    in_fp32(native.table(PRODIGY_PLUS.coefficients), torchs.table(PRODIGY_PLUS.coefficients))

    row = st.lists(st.one_of(signed, st.just(0.0)), min_size=len(of), max_size=len(of))
    totals = torch.tensor([data.draw(row) for _ in Total], dtype=torch.float64)
    totals[Total.DENOMINATOR :].abs_()
    # All ranks have heard of a number that is not finite.
    causes = [*Cause, 0, 0, 0, 0] if broken is None else [Cause.NUMBER, Cause.FAILURE]
    totals[Total.CAUSE] = data.draw(st.sampled_from(causes))
    if data.draw(st.booleans()):
        totals[Total.UPDATE_SQUARE, 0] = math.nan
    native.commit(totals)
    after = native._numbers.values.clone()
    native._numbers.values.copy_(numbers_before(of))
    torchs.commit(totals)
    for name, here, there in zip(torchs._numbers.rows, after, torchs._numbers.values, strict=True):
        assert torch.allclose(here, there, rtol=1e-12, atol=0, equal_nan=True), (name, here, there)


def numbers_before(of: list[dict[str, Any]]) -> Tensor:
    return GroupNumbers(PRODIGY_PLUS, of, HostAccess(CPU)).values


class Part:
    """Some parameters of the groups, with buffers and sums of their own."""

    def __init__(self, of: list[dict[str, Any]], data: st.DataObject) -> None:
        switches = [PRODIGY_PLUS.switches(group) for group in of]
        dtype = st.sampled_from(("torch.float32", "torch.bfloat16"))
        count = data.draw(st.sampled_from((1, 2, 4, 7, 10)))
        slots = tuple(
            Slot(data.draw(st.integers(0, len(of) - 1)), SHAPES[i % len(SHAPES)], data.draw(dtype), 3 * i)
            for i in range(count)
        )
        self.traits = Traits.of(SlotTable(slots, ()), switches, CPU)
        self.moments = FactoredMoments([None] * count, CPU)
        masks = self.traits.any_late_mask
        self.reductions = Reductions(Team(), count, [11], CPU, sums_early=True, needs_norms=True, masks_late=masks)
        values = st.lists(positive, min_size=count, max_size=count)
        self.parameters = torch.tensor([data.draw(values) for _ in PARAMETER_NUMBERS], dtype=torch.float64)
        self.parameters[0].round_()
        if data.draw(st.booleans()):
            self.parameters[1:] = 0
        stats = self.reductions.table.stats
        for column in Stat:
            stats[:, column] = torch.tensor(data.draw(values))
        stats[:, Stat.DOT] -= 1.0
        stats[:, Stat.PRESENT] = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
        self.reductions.sums.fill_(data.draw(st.sampled_from((1.0, 1.0, 1.0, math.inf))))
        where = data.draw(st.sampled_from((None, None, None, Stat.LARGEST_SQUARE, Stat.DOT, Stat.UU, Stat.GG)))
        if where is not None:
            stats[data.draw(st.integers(0, count - 1)), where] = data.draw(st.sampled_from((math.nan, math.inf)))
        # What no rank has a gradient of adds nothing.
        stats[stats[:, Stat.PRESENT] == 0, Stat.GG] = 0.0
        outcome = data.draw(st.sampled_from((*[None] * 6, *Outcome)))
        if outcome is not None:
            self.reductions.last.outcome[outcome] = 1.0
        self.count = count

    def buffers(self) -> Buffers:
        n = self.count
        return Buffers(
            coefficients=Coefficients(PRODIGY_PLUS.coefficients, n, CPU),
            factors=torch.zeros(0),
            new_moments=torch.zeros(0),
            adopt=None,
            scales=torch.zeros(len(Scales._fields), n),
            keys=torch.zeros(n, dtype=torch.int32),
            gates=Gates(torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)),
            sums=self.reductions.sums,
            stats=self.reductions.table.stats,
            masks=None if self.reductions.masks is None else self.reductions.masks.stats,
        )


@settings(max_examples=200)
@given(groups(COVERED), st.data())
def test_parameters(of: list[dict[str, Any]], data: st.DataObject) -> None:
    """Coefficients, keys, scales, verdicts, contributions and gates, for every switch that C++ knows."""
    compare_parameters(of, data, "native")


@pytest.mark.dist
def test_parameters_by_triton() -> None:
    """The ninth and tenth are in a second program, or a second round of one."""
    run(1, interpreted, _eight_parameters_at_once)


def _eight_parameters_at_once() -> None:
    from ppsf_dist.engine import triton_numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_numbers, "AT_ONCE", 8)
        _parameters_by_triton()


@settings(max_examples=30, deadline=None, database=None, phases=[Phase.generate])
@given(groups(COVERED), st.data())
def _parameters_by_triton(of: list[dict[str, Any]], data: st.DataObject) -> None:
    compare_parameters(of, data, "triton")


def compare_parameters(of: list[dict[str, Any]], data: st.DataObject, backend: str) -> None:
    part = Part(of, data)
    assert part.traits.are_common
    step, with_torch = both(of, backend)
    ours, theirs = part.buffers(), part.buffers()
    native = NumbersOfParameters(part.parameters, part.traits, ours, part.reductions).of_step(step)
    torchs = PartNumbers(with_torch, part.parameters, part.traits, theirs)
    assert type(native) is not PartNumbers
    if backend == "triton":
        assert list(step.rows.outcome._fields) == [outcome.name.lower() for outcome in Outcome]  # type: ignore[attr-defined]
    stats, host = part.reductions.table.stats, HostAccess(CPU)
    # Triton computes where the host does not read.
    host.free = backend == "native"
    for numbers in (native, torchs):
        numbers.begin(part.moments)
        numbers.fill_scales(stats)
    in_fp32(ours.coefficients.table, theirs.coefficients.table)
    in_fp32(ours.scales, theirs.scales)
    assert ours.keys.tolist() == theirs.keys.tolist()
    here, there = (numbers.verdict(part.reductions, host) for numbers in (native, torchs))
    assert here.active.tolist() == there.active.tolist()
    assert here.known == there.known and here.cause == there.cause
    for where in data.draw(st.lists(st.sampled_from(Stat), min_size=4, max_size=4)):
        kept = stats[0, where].item()
        stats[0, where] = math.nan
        assert native.verdict(part.reductions, host).cause == torchs.verdict(part.reductions, host).cause, where
        stats[0, where] = kept
    endings = [here]
    if here.cause == Cause.GRADIENT:
        endings.append(here.with_cause(Cause.WEIGHTS))
    for ending in endings:
        made, expected = native.contribution(stats, ending), torchs.contribution(stats, ending)
        close(made.parameters, expected.parameters)
        close(made.totals, expected.totals, 1e-9)
        assert native.fill_gates(ending, host) == torchs.fill_gates(ending, host)
        assert ours.gates.moments.tolist() == theirs.gates.moments.tolist()
        assert ours.gates.weights.tolist() == theirs.gates.weights.tolist()
