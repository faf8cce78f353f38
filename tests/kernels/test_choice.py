"""Which kernels compute what, how they come to a machine, and what happens beside and between their passes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import AdamWScheduleFree, ProdigyPlusScheduleFree, kernels
from ppsf_dist.kernels.cpu import library, source
from ppsf_dist.kernels.cpu.backend import NativeKernels
from ppsf_dist.kernels.cpu.tables import Job
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from tests.harness.kernels import kernels as using
from tests.kernels.sides import Cut, Side, make, twin

SWITCHES = PRODIGY_PLUS.switches({**PRODIGY_PLUS.arguments})


def trained(
    choice: str, steps: int = 3, between: Callable[[int, ProdigyPlusScheduleFree], None] | None = None
) -> Tensor:
    """Weights after some steps, and the numerator of d. Something may come between the steps."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(60, 50, generator=generator) * 0.02)
    with using(choice):
        optimizer = ProdigyPlusScheduleFree([p], d0=1e-3)
    for step in range(steps):
        p.grad = torch.randn(60, 50, generator=generator) * 0.01 + 0.01
        optimizer.step()
        if between is not None:
            between(step, optimizer)
    return torch.cat([p.detach().reshape(-1), torch.tensor([optimizer.param_groups[0]["d_numerator"]])])


def test_the_report_says_what_runs_where_and_why() -> None:
    on = [nn.Parameter(torch.ones(40, 30)), nn.Parameter(torch.ones(7, dtype=torch.float64))]
    groups: list[dict[str, Any]] = [{"params": on}, {"params": [nn.Parameter(torch.ones(5))], "use_adopt": True}]
    optimizer = ProdigyPlusScheduleFree(groups)
    with pytest.raises(RuntimeError, match="call this after step"):
        kernels.report(optimizer)
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    uses = {(use.backend, use.why): (use.parameters, use.elements) for use in kernels.report(optimizer)}
    assert uses == {
        ("native", ""): (1, 1200),
        ("eager", "weights in float64"): (1, 7),
        ("eager", "use_adopt"): (1, 5),
    }
    assert str(kernels.report(optimizer)[0]).startswith("native: 1 parameters, 1,200 elements (")


def test_a_stranger_has_no_kernels_to_report() -> None:
    with pytest.raises(TypeError, match="SGD has no kernels of ppsf_dist"):
        kernels.report(torch.optim.SGD([nn.Parameter(torch.ones(1))]))


def test_what_is_not_native_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ppsf_dist"):
        p = nn.Parameter(torch.ones(5))
        optimizer = ProdigyPlusScheduleFree([p], use_adopt=True)
        for _ in range(2):
            p.grad = torch.ones(5)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert [r.message for r in caplog.records if r.message.startswith("kernels")] == [
        "kernels: eager: 1 parameters, 5 elements (use_adopt)"
    ]


def test_a_choice_that_there_is_not_is_refused() -> None:
    with using("fast"), pytest.raises(ValueError, match="PPSF_KERNELS='fast' .* must be one of auto, eager, native"):
        ProdigyPlusScheduleFree([nn.Parameter(torch.ones(1))])


def test_eager_kernels_on_demand() -> None:
    p = nn.Parameter(torch.ones(40, 30))
    with using("eager"):
        optimizer = AdamWScheduleFree([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    (use,) = kernels.report(optimizer)
    assert (use.backend, use.why) == ("eager", "PPSF_KERNELS=eager")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine that was installed from source, has no compiler and never had one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PPSF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "BUILT", tmp_path / "none")
    library.found.cache_clear()
    yield
    library.found.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_eager_kernels_run_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    weights = trained("auto")
    assert torch.equal(weights, trained("eager"))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message.startswith("kernels: eager: 1 parameters, 3,000 elements (there is no C++ compiler (CXX, c++")


@pytest.mark.usefixtures("no_compiler")
def test_native_on_demand_is_an_error_without_a_compiler() -> None:
    with pytest.raises(RuntimeError, match="PPSF_KERNELS=native, but there are no native kernels: there is no C"):
        trained("native")


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fails = tmp_path / "cxx"
    fails.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setenv("CXX", str(fails))
    with pytest.raises(source.Unavailable, match="cxx cannot compile them: it is broken"):
        source.compile_into(tmp_path / "made.so", "AVX2")
    assert [path.name for path in tmp_path.iterdir()] == ["cxx"]


def test_both_sources_are_compiled_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that goes on once it has been called for both, and gives up after ten seconds."""
    waits = tmp_path / "cxx"
    waits.write_text(
        f"""#!/bin/sh
        case "$*" in --version) exit 0;; *" -c "*) ;; *) for to; do :; done; : > "$to"; exit 0;; esac
        : > {tmp_path}/called.$$
        for _ in $(seq 100); do [ $(ls {tmp_path}/called.* | wc -l) -ge 2 ] && exit 0; sleep 0.1; done
        echo it was called for one alone >&2; exit 1
        """
    )
    waits.chmod(0o755)
    monkeypatch.setenv("CXX", str(waits))
    source.compile_into(tmp_path / "made" / "made.so", "DEFAULT")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["made.so"]


def test_a_process_that_may_start_no_thread_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(source.Unavailable, match="cannot be compiled into .*: can't start new thread"):
        source.compile_into(tmp_path / "made" / "made.so", "DEFAULT")
    assert not list((tmp_path / "made").iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(source.Unavailable, match="cannot be compiled into .*file"):
        source.compile_into(tmp_path / "file" / "made.so", "DEFAULT")


def test_a_user_without_a_home_is_told_where_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("PPSF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(source.Unavailable, match="no home folder .* name one with PPSF_CACHE"):
        library.cache_folder()


def test_a_torn_library_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "torn.so").write_bytes(b"\x7fELF and nothing more")
    with pytest.raises(source.Unavailable, match="torn.so does not load"):
        library.Library(tmp_path / "torn.so")


def test_processes_that_compile_at_once_all_have_a_library(tmp_path: Path) -> None:
    script = "from ppsf_dist.kernels.cpu import library; print(library.load().path)"
    environment = {**os.environ, "PPSF_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate(timeout=120)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    (path,) = said
    assert [str(file) for file in tmp_path.iterdir()] == [path]


def by_copy(z: Tensor) -> None:
    z.copy_(z * 1.5)


def past_autograd(z: Tensor) -> None:
    z.data.copy_(z.data * 1.5)


def past_torch(z: Tensor) -> None:
    z.detach().numpy()[:] *= 1.5


@pytest.mark.parametrize("write", [by_copy, past_autograd, past_torch])
def test_whoever_writes_to_z_between_steps_is_noticed(write: Callable[[Tensor], None]) -> None:
    """d follows from samples of z, which are kept packed beside it."""

    def between(step: int, optimizer: ProdigyPlusScheduleFree) -> None:
        if step == 3:
            (p,) = optimizer.param_groups[0]["params"]
            write(optimizer.state[p]["z"])

    native, eager = (trained(choice, 6, between)[-1].item() for choice in ("native", "eager"))
    untouched = trained("native", 6)[-1].item()
    assert native == pytest.approx(eager, rel=1e-6) and native != pytest.approx(untouched, rel=1e-3)


def test_state_that_moves_is_found() -> None:
    """The memory of the same tensors: what an offload and back does. What lies at the old place is overwritten."""
    old = []

    def between(step: int, optimizer: ProdigyPlusScheduleFree) -> None:
        for entries in optimizer.state.values():
            for value in entries.values():
                if isinstance(value, Tensor) and value.dim() and not value._is_view():
                    before, value.data = value.data, value.detach().clone()
                    old.append(before.fill_(torch.nan))

    assert torch.equal(trained("native", 5, between), trained("native", 5))
    assert len(old) >= 15


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_weights_may_change_their_order_in_memory(backend: str) -> None:
    """What ``model.to(memory_format=torch.channels_last)`` does in mid-run: from then on their kernels are eager."""
    runs = []
    for moves in (False, True):
        model = nn.Conv2d(8, 40, 3)
        with torch.no_grad(), using(backend):
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
            optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)
        for step in range(4):
            if moves and step == 2:
                model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
                assert not model.weight.is_contiguous()
            for p in model.parameters():
                p.grad = torch.linspace(-1, step + 1, p.numel()).view(p.shape)
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
        uses = {(use.backend, use.why) for use in kernels.report(optimizer)}
        expected = {("native", ""), ("eager", "strides of the weights")} if moves else {("native", "")}
        assert backend == "eager" or uses == expected
    for stayed, moved in zip(*runs, strict=True):
        torch.testing.assert_close(stayed, moved, rtol=1e-5, atol=1e-7)


class Marked(Tensor):
    """A tensor that is not where its data_ptr() says, for all that kernels know."""


def test_tensors_of_other_classes_are_left_to_torch() -> None:
    p = nn.Parameter(torch.ones(40, 30).as_subclass(Marked))
    p.grad = torch.ones(40, 30)
    optimizer = ProdigyPlusScheduleFree([p])
    optimizer.step()
    assert [(use.backend, use.why) for use in kernels.report(optimizer)] == [("eager", "tensors of class Marked")]


def test_samples_of_two_dtypes_are_left_to_torch() -> None:
    """A state dict may bring them; they stay what they are."""
    p = nn.Parameter(torch.ones(40, 30))
    p.grad = torch.ones(40, 30)
    optimizer = ProdigyPlusScheduleFree([p])
    optimizer.step()
    loaded = optimizer.state_dict()
    assert loaded["state"][0]["s"].dtype == loaded["state"][0]["p0"].dtype == torch.bfloat16
    loaded["state"][0]["s"] = loaded["state"][0]["s"].float()
    optimizer.load_state_dict(loaded)
    optimizer.step()
    assert optimizer.state[p]["s"].dtype == torch.float32
    whys = [(use.backend, use.why) for use in kernels.report(optimizer)]
    assert whys == [("eager", "p0 and s of different dtypes")]


def test_autograd_sees_that_weights_have_changed() -> None:
    x, p = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2))
    optimizer = ProdigyPlusScheduleFree([p])
    loss = (x * p).sum()
    p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def large() -> Side:
    """Pieces of many tasks, and of one."""
    cuts = [Cut.everything((1500, 1100)), Cut.everything((3_000_000,)), Cut.range((900, 1000), 1234, 700_000)]
    return make([*cuts, Cut.everything((20, 30))], SWITCHES, torch.bfloat16, seed=0)


def stepped(side: Side, threads: int) -> dict[str, Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        side.prepare(NativeKernels(library.load()))
        side.bind()
        side.passes.pass_1(goes_on=True)
        side.passes.update_moments()
        side.passes.fill_factors()
        side.passes.pass_2()
        side.write()
    finally:
        torch.set_num_threads(before)
    return {"sums": side.buffers.sums, "stats": side.buffers.stats, **side.tensors()}


@torch.no_grad()
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    """One thread goes on to the norms of a parameter while its gradient is in the cache; several do not."""
    side = large()
    alone, together = stepped(twin(side), 1), stepped(twin(side), threads)
    assert all(torch.equal(together[name], value) for name, value in alone.items())


@torch.no_grad()
def test_several_threads_work_at_once() -> None:
    """Those of the pool are started, and named."""
    stepped(large(), 3)
    assert sum(thread.name.startswith("ppsf_dist") for thread in threading.enumerate()) >= 2


@torch.no_grad()
def test_a_write_that_was_interrupted_goes_on_and_does_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    side = large()
    expected = stepped(twin(side), 1)
    side.prepare(NativeKernels(library.load()))
    side.bind()
    side.passes.pass_1(goes_on=False)
    side.passes.update_moments()
    side.passes.fill_factors()
    side.passes.pass_2()
    (passes,) = [side.passes]
    crew = passes._crew  # type: ignore[attr-defined]
    whole = crew.finish

    def half(what: object, job: Job) -> None:
        last, job.last = job.last, job.last // 2
        whole(what, job)
        # What a thread finds that asks for more: as many numbers are taken as there are threads.
        job.last, job.next = last, last // 2
        raise KeyboardInterrupt

    monkeypatch.setattr(crew, "finish", half)
    with pytest.raises(KeyboardInterrupt):
        side.write()
    monkeypatch.undo()
    side.write()
    side.write()
    assert all(torch.equal(side.tensors()[name], value) for name, value in expected.items() if name in side.tensors())
