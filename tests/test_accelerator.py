"""A step on a device that is not the host's: the meta device stands in for an accelerator.

It has no values, so a read of one raises, and everything that a step makes on the host by mistake is seen where it
meets a tensor of the device.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.sets import SETS
from ppsf_dist import ProdigyPlusScheduleFree, clip_grad_norm_
from ppsf_dist.engine.host import PendingCopy
from ppsf_dist.kernels.eager import work
from ppsf_dist.kernels.eager.work import TEMPORARIES, few_launches, memory_of
from tests.harness.models import NamedShapes, named_shapes
from tests.rotation import rotated
from tests.switches import EVERY, Switch

DEVICE = torch.device("meta")
SHAPES = named_shapes("small")
COPIES = ("aten::copy_", "aten::_to_copy")
STEPS = 3


class DeviceOnly(TorchDispatchMode):
    """Collects operators that use tensors of host and device together, counts copies to the device and operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mixed: list[str] = []
        self.uploads = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        returned = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.launches += not func.is_view
        # Numbers as tensors may lie on the host anywhere.
        host = [value for value in given if value.device != DEVICE and value.dim()]
        on_device = any(value.device == DEVICE for value in given + returned)
        if host and on_device:
            if func.name().split(".")[0] in COPIES:
                self.uploads += 1
            else:
                self.mixed.append(func.name())
        return result


@pytest.fixture(autouse=True)
def _published_numbers_never_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no values to copy to the host; the copy does not wait, so a step must go on without it."""

    def start(self: PendingCopy, values: torch.Tensor, *, wants_event: bool) -> None:
        pass

    monkeypatch.setattr(PendingCopy, "__init__", start)
    monkeypatch.setattr(PendingCopy, "take", lambda self, *, wait=False: None)


def build(
    shapes: NamedShapes, dtype: torch.dtype, switch: Switch
) -> tuple[list[nn.Parameter], ProdigyPlusScheduleFree]:
    parameters = [nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE)) for _, shape in shapes]
    groups = [{"params": parameters[index::2]} for index in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parameters, ProdigyPlusScheduleFree(groups, **switch)


# The plan for frozen statistics is another one, and writing the numbers of the first back to the state reads them once.
WITHOUT_REPLANNING = {name: switch for name, switch in EVERY.items() if not 0 < switch.get("prodigy_steps", 0) < STEPS}


@pytest.mark.parametrize(("dtype", "name"), rotated([torch.float32, torch.bfloat16], WITHOUT_REPLANNING, rounds=1))
def test_a_step_stays_on_the_device(name: str, dtype: torch.dtype) -> None:
    parameters, optimizer = build(SHAPES, dtype, EVERY[name])
    for step in range(STEPS):
        for index, parameter in enumerate(parameters):
            # One of them never has a gradient, one only later.
            missing = index == 1 or (index == 2 and not step)
            parameter.grad = None if missing else torch.empty_like(parameter)
        with DeviceOnly() as seen:
            optimizer.step()
        assert not seen.mixed
    assert not seen.uploads, "what never changes is sent to the device once"
    assert all(
        value.device == DEVICE
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_single_parameters_stay_on_the_device(dtype: torch.dtype) -> None:
    parameters, optimizer = build(SHAPES, dtype, {"fused_back_pass": True})
    for step in range(STEPS):
        with DeviceOnly() as seen:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
                optimizer.step_param(parameter)
                parameter.grad = None
            optimizer.step()
        assert not seen.mixed and (not step or not seen.uploads)


def launches_of_a_step(shapes: NamedShapes, dtype: torch.dtype) -> int:
    parameters, optimizer = build(shapes, dtype, {})
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with DeviceOnly() as seen:
            optimizer.step()
    return int(seen.launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tensors_of_a_shape_are_computed_as_one(dtype: torch.dtype) -> None:
    few, many = (launches_of_a_step([(f"w{i}", (16, 64)) for i in range(n)], dtype) for n in (10, 500))
    assert few == many < 500


def launches_of_the_reference(shapes: NamedShapes, dtype: torch.dtype) -> int:
    """On the host, because it reads values, and of smaller tensors: it starts as many."""
    parameters = [nn.Parameter(torch.ones([n // 16 for n in shape], dtype=dtype)) for _, shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    reference = Reference(parameters)
    reference.step()
    with DeviceOnly() as seen:
        reference.step()
    return int(seen.launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gigabytes", [16, 24, 80])
def test_a_language_model_starts_four_tenths_fewer_operators_than_the_reference(
    gigabytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 small: 148 tensors. An accelerator waits for the host if they are many more than it can compute."""
    monkeypatch.setattr(work, "memory_of", lambda device: gigabytes * 10**9)
    shapes = [(str(i), shape) for i, shape in enumerate(SETS["gpt2"])]
    launches, of_the_reference = launches_of_a_step(shapes, dtype), launches_of_the_reference(shapes, dtype)
    assert launches <= 0.6 * of_the_reference, (launches, of_the_reference)


@pytest.mark.parametrize("gigabytes", [1, 2, 8, 24, 25, 80, 100, 1000])
def test_tiles_take_a_twenty_fifth_of_an_accelerator_s_memory_at_most(gigabytes: int) -> None:
    """And no fewer elements than half of what is allowed, up to what gains nothing."""
    memory = gigabytes * 10**9
    sizes = few_launches(memory)
    needed = sizes.tile * 4 * TEMPORARIES
    assert needed <= memory / 25 and 2 * sizes.stack <= sizes.tile
    assert 2 * needed > memory / 25 or sizes.tile == 1 << 25


def test_an_accelerator_that_does_not_say_how_much_memory_it_has() -> None:
    assert memory_of(DEVICE) == memory_of(torch.device("mps")) == 24 * 10**9


def test_clipping_stays_on_the_device() -> None:
    parameters, _ = build(SHAPES, torch.float32, {})
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with DeviceOnly() as seen:
        norm = clip_grad_norm_(parameters, 1.0)
    assert not seen.mixed and norm.device == DEVICE


def test_a_changed_argument_is_sent_to_the_device() -> None:
    parameters, optimizer = build(SHAPES, torch.float32, {})
    uploads = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1.0 if step < STEPS - 1 else 0.5
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with DeviceOnly() as seen:
            optimizer.step()
        uploads.append(seen.uploads)
    assert uploads[-2:] == [0, 1]


def test_mixing_and_uploads_are_seen() -> None:
    with DeviceOnly() as seen:
        torch.empty(3, 2, device=DEVICE).index_select(0, torch.zeros(1, dtype=torch.int64))
        torch.ones(2).to(DEVICE)
    assert seen.mixed == ["aten::index_select"] and seen.uploads == 1
