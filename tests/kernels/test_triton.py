"""The Triton passes: against the eager ones in Triton's interpreter, and compiled for GPUs that are not here.

The interpreter has to be asked for before Triton is imported, so all that runs in it does so on ranks of the pool.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import ppsf_dist
from ppsf_dist import ProdigyPlusScheduleFree, kernels
from ppsf_dist.kernels.codes import COEFFICIENTS, Flag, Piece, Sum
from ppsf_dist.kernels.triton.cutting import STEPS, cut
from ppsf_dist.kernels.triton.tables import On, Rows
from ppsf_dist.methods.sums import Stat
from tests.family import FAMILY
from tests.harness import graph
from tests.harness.kernels import as_on_an_accelerator, interpreted
from tests.harness.kernels import kernels as kernels_of
from tests.harness.layouts import LAYOUTS, Layout
from tests.harness.pool import run
from tests.kernels.compiled import TARGETS
from tests.kernels.sides import CUTS, make, twin
from tests.kernels.test_native import CLAIMED, compare
from tests.rotation import rotated
from tests.runs import SINGLE, Run, difference, open_loop, open_loop_without_start
from tests.switches import EVERY

SPILLS = 10
"""Of some hundred instructions of a loop. With registers for all of it fewer programs run at once, and it is slower."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _against_eager(name: str, dtype: torch.dtype, cut: str, seed: int) -> None:
    from ppsf_dist.kernels.triton.backend import TritonKernels

    some: dict[str, Any] = {("missing", "closed", "replicas", "nothing")[seed % 4]: [0]}
    some.pop("nothing", None)
    # The interpreter does not fuse where a GPU does, so that a rounding may fall on the other side.
    compare(make([CUTS[cut]], CLAIMED[name], dtype, seed=seed, **some), TritonKernels(), exactly=False)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "cut"), rotated(CLAIMED, CUTS, rounds=1))
def test_every_claim_equals_the_eager_kernels(name: str, cut: str) -> None:
    """fp32 and bf16 in turn; without a gradient, with its gate closed, as a replica, or as it is, in turn."""
    number = list(CLAIMED).index(name) + list(CUTS).index(cut)
    run(1, interpreted, _against_eager, name, list(DTYPES.values())[number % 2], cut, number // 2)


@pytest.mark.dist
@pytest.mark.parametrize(("cut", "dtype"), rotated(CUTS, DTYPES, rounds=1))
def test_every_cut_equals_the_eager_kernels(cut: str, dtype: str) -> None:
    run(1, interpreted, _against_eager, "default", DTYPES[dtype], cut, 3)


@pytest.mark.dist
@pytest.mark.parametrize("slice_p", [1, 2, 5, 11, 97])
def test_samples_of_every_distance(slice_p: int) -> None:
    """In tiles that have many of a line, one or none; of lines that follow each other and of others."""
    run(1, interpreted, _at_distance, slice_p)


def _at_distance(slice_p: int) -> None:
    from ppsf_dist.kernels.triton.backend import TritonKernels

    switches = replace(CLAIMED["default"], slice_p=slice_p)
    for name in ("whole", "very tall", "flat", "columns", "wide", "odd"):
        compare(make([CUTS[name]], switches, torch.float32, seed=slice_p), TritonKernels(), exactly=False)


@pytest.mark.parametrize(
    ("lines", "n", "slice_p", "says"),
    [(2, 2**30 + 1, 11, f"lines of {2**30 + 1} elements"), (2, 40, 2**20 + 1, f"slice_p={2**20 + 1}")],
)
def test_what_32_bits_do_not_hold_is_refused(lines: int, n: int, slice_p: int, says: str) -> None:
    with pytest.raises(ValueError, match=f"{says}: Triton's kernels count up to .*set PPSF_KERNELS=eager"):
        cut([Piece(lines=lines, n=n, slice_p=slice_p, axes=1)])


def test_lines_as_long_as_32_bits_hold_are_a_task_each() -> None:
    longest = Piece(lines=2, n=2**30, slice_p=11, axes=1, flags=int(Flag.FLAT))
    assert [(task.first_line, task.last_line) for task in cut([longest]).tasks] == [(0, 1), (1, 2)]


SHAPES = [("matrix", (40, 12)), ("vector", (7,)), ("stack", (3, 33, 4))]
SWITCHES_IN_TURN = ("default", "speed", "unfactored", "bias_correction", "weight_decay", "moving_d", "adopt")
SISTERS_IN_TURN = (("Prodigy", "bias_correction"), ("SGDScheduleFree", "warmup"), ("RAdamScheduleFree", "sgd_phase"))
IN_TURN: dict[str, dict[str, Any]] = {
    **{name: EVERY[name] for name in SWITCHES_IN_TURN},
    **{name: {"optimizer_class": name, **FAMILY[name].variants[variant]} for name, variant in SISTERS_IN_TURN},
}
"""Arguments of runs."""
LAYOUTS_IN_TURN = [name for name, layout in LAYOUTS.items() if 1 < layout.world_size <= 3]


@pytest.mark.dist
@pytest.mark.parametrize(("name", "which"), rotated(LAYOUTS_IN_TURN, IN_TURN, rounds=1))
def test_every_layout_gives_the_run_of_one_process(name: str, which: str) -> None:
    """Beside the C++ kernels in one process. Numbers too are Triton's, since the host does not read them."""
    reference = open_loop(SINGLE, SHAPES, 3, groups=2, **IN_TURN[which])
    runs: list[tuple[Run, int]] = run(LAYOUTS[name].world_size, interpreted, _trained, LAYOUTS[name], which)
    assert all(steps == 3 for _, steps in runs)
    assert all(other.groups == runs[0][0].groups for other, _ in runs)
    apart = difference(runs[0][0], reference)
    assert apart["d"] <= 1e-6 and apart["weights"] <= 1e-5, apart


def _trained(layout: Layout, which: str) -> tuple[Run, int]:
    """A run as on an accelerator, and how many of its steps had numbers of Triton."""
    from ppsf_dist.kernels.triton.step_numbers import TritonNumbers

    steps, end = 0, TritonNumbers.end

    def counted(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        end(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        as_on_an_accelerator(patch)
        patch.setattr(TritonNumbers, "end", counted)
        return open_loop_without_start(layout, SHAPES, 3, groups=2, **IN_TURN[which]), steps


LAUNCHED = {
    "ProdigyPlusScheduleFree": (6 + 8 + 7, 11),
    "Prodigy": (2 + 1 + 9, 12),
    "AdamWScheduleFree": (2 + 1 + 7, 11),
}
"""By a step on matrices and vectors: kernels of its passes, of what adds up their sums and keeps their moments, and of
numbers; and operators of torch, which empty what is summed and copy."""


@pytest.mark.dist
@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_step_launches_does_not_grow_with_parameters_and_groups(name: str) -> None:
    few, many = run(1, interpreted, _launched, name)[0]
    kernels_ = [launched for launched in few if not launched.startswith("aten")]
    most, operators = LAUNCHED[name]
    assert few == many
    assert len(kernels_) <= most and len(few) - len(kernels_) <= operators, few


def _launched(name: str) -> list[list[str]]:
    """By a step of two parameters in one group, and by one of six in three."""
    return [_launched_by(name, 1, 1), _launched_by(name, 3, 3)]


def _launched_by(name: str, pairs: int, groups: int) -> list[str]:
    made = [nn.Parameter(torch.ones(shape)) for _ in range(pairs) for shape in ((40, 12), (7,))]
    size = len(made) // groups
    of_groups = [{"params": made[at : at + size]} for at in range(0, len(made), size)]
    optimizer = getattr(ppsf_dist, name)(of_groups)
    with pytest.MonkeyPatch.context() as patch:
        as_on_an_accelerator(patch)
        for _ in range(2):
            for p in made:
                p.grad = torch.full_like(p, 0.01)
            launched = graph.launches(optimizer.step)
    return launched


def _two_steps(past_torch: bool) -> tuple[list[Any], str]:
    """Weights, the numerator of d and the kernels after two steps, of which somebody else moves z in the second."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 30) * 0.02)
    optimizer = ProdigyPlusScheduleFree([p], d0=1e-3)
    for step in range(2):
        p.grad = torch.randn(40, 30) * 0.01
        if step and past_torch:
            # Past torch, which would count it.
            memory: numpy.ndarray[Any, Any] = optimizer.state[p]["z"].numpy()
            memory += 0.01
        elif step:
            optimizer.state[p]["z"].add_(0.01)
        optimizer.step()
    return [p.tolist(), optimizer.param_groups[0]["d_numerator"]], kernels.report(optimizer)[0].backend


@pytest.mark.dist
def test_packed_samples_follow_whoever_writes_to_z() -> None:
    (past_torch, backend), (through_torch, _) = (
        run(1, interpreted, _two_steps, past_torch)[0] for past_torch in (True, False)
    )
    assert backend == "triton"
    assert past_torch == through_torch


def _of_two_dtypes() -> tuple[list[Any], str]:
    """Weights after three steps of kernels of a convolution and vectors in fp32 and bf16, and the kernels."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(36, 5, 3, 3), (33,), (40, 12)]
    params = [
        nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        for dtype in DTYPES.values()
        for shape in shapes
    ]
    optimizer = ProdigyPlusScheduleFree(params, d0=1e-3)
    for _ in range(3):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.dtype)
        optimizer.step()
    backends = {use.backend for use in kernels.report(optimizer)}
    return [*[p.float() for p in params], torch.tensor(optimizer.get_d())], "".join(backends)


@pytest.mark.dist
def test_one_optimizer_may_hold_both_dtypes() -> None:
    ours, backend = run(1, interpreted, _of_two_dtypes)[0]
    assert backend == "triton"
    for one, other in zip(ours, _of_two_dtypes()[0], strict=True):
        # Rounded to bf16 an element in a thousand may fall on the other side.
        assert ((one - other).abs() > 1e-6 * other.abs() + 1e-9).sum() <= 1 + one.numel() // 1000


def _written_twice() -> None:
    from ppsf_dist.kernels.triton.backend import TritonKernels

    once = make([CUTS["whole"], CUTS["odd"]], CLAIMED["default"], torch.bfloat16, seed=0)
    twice = twin(once)
    for side, times in ((once, 1), (twice, 2)):
        side.prepare(TritonKernels())
        side.bind()
        side.passes.pass_1(goes_on=False)
        side.passes.update_moments()
        side.passes.fill_factors()
        for _ in range(times):
            side.write()
    for name, value in once.tensors().items():
        assert torch.equal(value, twice.tensors()[name]), name


@pytest.mark.dist
def test_writing_again_changes_nothing() -> None:
    """As after an exception between two launches: what was written before it is left alone."""
    run(1, interpreted, _written_twice)


def test_no_constant_of_a_module_is_hidden_from_the_cache_of_compiled_kernels() -> None:
    for path in (Path(kernels.__file__).parent / "triton").glob("*.py"):
        source = path.read_text()
        assert "@triton.jit" not in source or not re.findall(r"\b(?:walk|formulas|element)\.[A-Z]", source), path


def test_the_names_of_flags_and_coefficients_are_those_of_the_codes() -> None:
    assert [flag.name and flag.name.lower() for flag in Flag] == list(On._fields)
    assert tuple(Rows._fields) == COEFFICIENTS
    assert [Stat[sum_.name] - Stat.LARGEST_SQUARE for sum_ in Sum] == list(Sum)


def test_without_an_interpreter_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with kernels_of("triton"):
        optimizer = ProdigyPlusScheduleFree([p])
    with pytest.raises(
        RuntimeError, match="PPSF_KERNELS=triton, but there are no triton kernels: on a CPU Triton only"
    ):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_launched_by_triton_itself(tmp_path: Path) -> None:
    """All but the GPU: what the interpreter lets pass and a launch refuses. Nothing is compiled again after two steps,
    wherever gradients lie.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": ""}
    command = [sys.executable, "-m", "tests.kernels.launched"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert not done.returncode, done.stderr
    in_fp32, in_bf16, prodigy, sgd, radam = map(set, json.loads(done.stdout))
    of_parameters = {"fill_coefficients", "fill_scales", "find_cause", "contribute", "fill_gates"}
    passes = {"pass_1", "pass_3"}
    assert passes | of_parameters | {"pass_2", "begin_prodigy_plus", "end_prodigy_plus"} <= in_fp32
    assert in_bf16 == {*in_fp32, "fill_keys"}
    assert passes | of_parameters | {"begin_prodigy", "learn_prodigy", "end_prodigy"} <= prodigy
    assert passes | of_parameters | {"begin_schedulefree", "end_schedulefree"} <= sgd == radam


def test_compiled_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """All kernels. Where memory is aligned the tiles of a matrix are read and written 16 bytes at a time: the gradient
    in passes 1 and 2, with weights and z in pass 3, and those written. There a few instructions of several hundred are
    for what registers do not hold.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": ""}
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert not done.returncode, done.stderr
    assembly: dict[str, dict[str, int]] = json.loads(done.stdout)
    assert {name.split()[0] for name in assembly} == set(TARGETS)
    for name, found in assembly.items():
        target, kernel, dtype = (*name.split(), "")[:3]
        assert found["registers"], name
        if dtype not in DTYPES:
            continue
        if target == "gfx942":
            assert not found["spilled bytes"], (name, found)
        else:
            assert found["spills of wide loops"] <= SPILLS, (name, found)
        loads, stores = {"pass_1": (1, 0), "pass_2": (1, 0), "pass_3": (3, 2)}[kernel]
        times = STEPS[kernel].of_thread * DTYPES[dtype].itemsize // 16
        assert found["wide loads"] >= loads * times, (name, found)
        assert found["wide stores"] >= stores * times, (name, found)
