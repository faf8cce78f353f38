"""The C++ passes against the eager ones, on the same memory and numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppsf_dist
from ppsf_dist.kernels.cpu import library
from ppsf_dist.kernels.cpu.backend import NativeKernels
from ppsf_dist.kernels.eager import EagerKernels
from ppsf_dist.kernels.interface import Kernels
from ppsf_dist.kernels.pieces import why_not
from ppsf_dist.methods.sums import Stat
from ppsf_dist.methods.switches import Switches
from tests.family import FAMILY
from tests.kernels.sides import Cut, Side, make, terms, twin
from tests.switches import EVERY

COUNTED = (Stat.EARLY_MASK, Stat.LATE_MASK)


def switches_of(name: str, **arguments: Any) -> Switches:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = getattr(ppsf_dist, name)([torch.nn.Parameter(torch.zeros(1))], **arguments)
    switches: Switches = optimizer.method.switches(optimizer.param_groups[0])
    return switches


def claimed() -> dict[str, Switches]:
    """Every point of the space of methods that the native kernels say they compute, once."""
    every = {name: switches_of("ProdigyPlusScheduleFree", **switch) for name, switch in EVERY.items()}
    for optimizer, member in FAMILY.items():
        every |= {f"{optimizer} {name}": switches_of(optimizer, **some) for name, some in member.variants.items()}
    points: dict[Switches, str] = {}
    for name, switches in every.items():
        side = make([Cut.everything((3,))], switches, torch.float32, seed=0)
        if why_not(side.shards[0], switches, side.state[side.shards[0].param]) is None:
            points.setdefault(switches, name)
    return {name: switches for switches, name in points.items()}


CLAIMED = claimed()


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """A parameter of up to four axes, and what a shard holds of it."""
    axes = draw(st.integers(0, 4))
    longest = {0: 1, 1: 3000, 2: 70, 3: 40, 4: 9}[axes]
    shape = tuple(draw(st.lists(st.integers(1, longest), min_size=axes, max_size=axes)))
    if axes == 2 and draw(st.booleans()):
        wide = draw(st.integers(190, 1100))
        shape = (shape[0] % 20 + 1, wide) if draw(st.booleans()) else (wide, shape[0] % 20 + 1)
    elif axes == 2 and draw(st.booleans()):
        # Lines as short as the ranks of adapters have loops of their own.
        shape = (draw(st.integers(1, 300)), draw(st.sampled_from((8, 16, 32, 64))))
    if axes == 4 and draw(st.booleans()):
        shape = (draw(st.integers(32, 40)), *shape[1:])
        if draw(st.booleans()):
            # Kernels whose lines are longer than a block.
            kernel = draw(st.sampled_from(((3, 3), (5, 5), (7, 7), (2, 9))))
            longest = 1600 // (kernel[0] * kernel[1])
            shape = (shape[0], draw(st.integers(longest // 2, longest)), *kernel)
    kind = draw(st.sampled_from(("everything", "box", "range")))
    numel = torch.Size(shape).numel()
    if kind == "range" and axes:
        start = draw(st.integers(0, numel))
        return Cut.range(shape, start, draw(st.integers(0, numel - start)))
    if kind == "box" and axes:
        offset = tuple(draw(st.integers(0, n)) for n in shape)
        return Cut.box(shape, offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))
    return Cut.everything(shape)


def allowed(before: Side, eager: Side, name: str) -> Tensor:
    """Two units in the last place of a value and of what it is computed from, and two of the step
    that y or z makes.

    torch's square root is off by up to one itself (MKL's).
    """
    kind, _, index = name.partition(" of ")
    old, after = before.tensors(), eager.tensors()
    sizes, step = [after[name].float().abs()], torch.zeros(())
    if kind in ("y", "z"):
        both = [key for key in (f"y of {index}", f"z of {index}") if key in old]
        sizes += [old[key].float().abs() for key in both]
        step = torch.stack([(after[key].float() - old[key].float()).abs() for key in both]).amax(0)
    return (torch.stack(sizes).amax(0) + step) * 2 * torch.finfo(torch.float32).eps


def check_sums(native: Side, eager: Side) -> None:
    ours, theirs = native.buffers, eager.buffers
    assert torch.allclose(ours.sums.cpu(), theirs.sums, rtol=3e-6, atol=0)
    for one, other in ((ours.stats, theirs.stats), (ours.masks, theirs.masks)):
        assert one is not None and other is not None
        table = one.cpu()
        assert torch.equal(table[:, list(COUNTED)], other[:, list(COUNTED)])
        largest = Stat.LARGEST_SQUARE
        assert torch.equal(table[:, largest].isfinite(), other[:, largest].isfinite())
        for stat in set(Stat) - {*COUNTED, largest, Stat.DOT}:
            assert torch.allclose(table[:, stat], other[:, stat], rtol=3e-6, atol=0, equal_nan=True), stat.name
        for slot in range(len(table)):
            # The products are the same, and summed in fp64: their terms may cancel.
            apart = (table[slot, Stat.DOT] - other[slot, Stat.DOT]).abs()
            assert apart <= 1e-13 * terms(eager, slot) or not other[slot, Stat.DOT].isfinite()


def native_kernels() -> NativeKernels:
    return NativeKernels(library.load())


@torch.no_grad()
def compare(side: Side, kernels: Kernels, *, exactly: bool, on_device: Side | None = None) -> None:
    """One step of a backend and of the eager one from the same state; each part of it begins from the same numbers.

    Args:
        side: of the eager one.
        kernels: of the backend.
        exactly: whether bf16 has to be the same bit for bit.
        on_device: the same as ``side`` where the backend runs, if that is not here.
    """
    native, eager = twin(side if on_device is None else on_device), twin(side)
    native.prepare(kernels)
    eager.prepare(EagerKernels())
    for one in (native, eager):
        one.bind()
        one.passes.pass_1(goes_on=False)
    check_sums(native, eager)
    native.buffers.sums.copy_(eager.buffers.sums)
    for one in (native, eager):
        one.passes.update_moments()
        one.passes.fill_factors()
    assert torch.equal(native.buffers.new_moments.cpu(), eager.buffers.new_moments)
    assert torch.allclose(native.buffers.factors.cpu(), eager.buffers.factors, rtol=3e-7, atol=0)
    native.buffers.factors.copy_(eager.buffers.factors)
    for one in (native, eager):
        one.passes.pass_2()
        one.passes.count_masks()
    check_sums(native, eager)
    for one in (native, eager):
        one.write()
    for name, theirs in eager.tensors().items():
        ours = native.tensors()[name].cpu()
        if theirs.dtype == torch.float32:
            assert ((ours - theirs).abs() <= allowed(side, eager, name)).all(), name
        elif exactly:
            assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), name
        else:
            assert (ours != theirs).sum() <= 1 + theirs.numel() / 1000, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CLAIMED)
def test_every_claim_equals_the_eager_kernels(name: str, dtype: torch.dtype) -> None:
    """Whole tensors, boxes and ranges; missing gradients, replicas, gates: fp32 to 2 ulp, bf16 bit for bit.

    The arc tangent is torch's to one unit in the last place, so that a rounding may fall on the other side.
    """

    @settings(max_examples=20, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
    @given(some=st.lists(cuts(), min_size=1, max_size=5), seed=st.integers(0, 1000), data=st.data())
    def run(some: list[Cut], seed: int, data: st.DataObject) -> None:
        subset = st.sets(st.integers(0, len(some) - 1))
        missing, closed, replicas = (sorted(data.draw(subset)) if data.draw(st.booleans()) else [] for _ in range(3))
        side = make(some, CLAIMED[name], dtype, seed=seed, missing=missing, closed=closed, replicas=replicas)
        compare(side, native_kernels(), exactly=not CLAIMED[name].atan2)

    run()


@pytest.mark.parametrize("shape", [(170, 160, 3, 3), (70, 160, 5, 5), (512, 20, 4, 4), (130, 1100)], ids=str)
@pytest.mark.parametrize("name", ["default", "speed", "momentum"])
def test_parameters_of_several_tasks(name: str, shape: tuple[int, ...]) -> None:
    """Sums along lines are added up in two stages; the last lines of a task are not four."""
    some = [Cut.everything(shape), Cut.box(shape, (3, *[0] * (len(shape) - 1)), (101 % shape[0], *shape[1:]))]
    compare(make(some, CLAIMED[name], torch.float32, seed=0), native_kernels(), exactly=True)


@pytest.mark.parametrize("name", ["default", "cautious"])
def test_a_replica_of_one_long_line_of_kernels(name: str) -> None:
    """It is cut anywhere, in the middle of a kernel too."""
    some = [Cut.box((33, 16000, 3, 3), (1, 0, 0, 0), (1, 16000, 3, 3))]
    compare(make(some, CLAIMED[name], torch.float32, seed=0, replicas=[0]), native_kernels(), exactly=True)


@pytest.mark.parametrize("name", ["default", "cautious", "Prodigy default"])
def test_a_rank_may_hold_nothing(name: str) -> None:
    """Every shard is empty, as on the last of more ranks than rows."""
    for cut in (Cut.range((40, 30), 7, 0), Cut.box((40, 30), (40, 0), (0, 30))):
        compare(make([cut, cut], CLAIMED[name], torch.float32, seed=0), native_kernels(), exactly=True)


def test_what_is_claimed() -> None:
    """All but FOCUS, OrthoGrad and ADOPT; all sisters."""
    eager = {name for name in EVERY if switches_of("ProdigyPlusScheduleFree", **EVERY[name]) not in CLAIMED.values()}
    assert eager == {name for name in EVERY if any(word in name for word in ("focus", "orthograd", "adopt"))}
    assert all(
        switches_of(name, **some) in CLAIMED.values() for name in FAMILY for some in FAMILY[name].variants.values()
    )
