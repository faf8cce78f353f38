"""The C++ passes by a compiler and for machines that are not those of the other tests: clang, ARM, a Mac.

``ziglang`` is a clang with all its targets. What it makes for this machine is linked by the compiler that is here:
linking anything for the first time takes it two minutes.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppsf_dist.kernels.cpu import library, source
from ppsf_dist.kernels.cpu.backend import NativeKernels
from tests.kernels.sides import Cut, make
from tests.kernels.test_native import CLAIMED, compare

CLANG = [sys.executable, "-m", "ziglang", "c++"]
CUTS = [
    Cut.everything((37, 300)),
    Cut.box((40, 1100), (3, 0), (21, 1100)),
    Cut.range((50, 30), 77, 901),
    Cut.everything((6, 5, 3, 3)),
    Cut.everything((1000,)),
]
ARM = {"aarch64-linux-gnu": "aarch64", "aarch64-macos": "arm64"}


def as_compiler(path: Path, *flags: str) -> Path:
    """A program that compiles by clang with some flags before its own."""
    linker, _ = source.compiler()
    path.write_text(
        f"""#!/bin/sh
        case " $* " in
            *" --version "*) exec {shlex.join(CLANG)} --version;;
            *" -c "*|*" -S "*) exec {shlex.join([*CLANG, *flags])} "$@";;
        esac
        exec {shlex.quote(linker)} "$@"
        """
    )
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def by_clang(tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    folder = tmp_path_factory.mktemp("clang")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(as_compiler(folder / "cxx")))
        source.compile_into(folder / "passes.so", torch.backends.cpu.get_cpu_capability())
    return NativeKernels(library.Library(folder / "passes.so"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CLAIMED)
def test_every_claim_holds_by_clang(name: str, dtype: torch.dtype, by_clang: NativeKernels) -> None:
    side = make(CUTS, CLAIMED[name], dtype, seed=0, replicas=[1], missing=[2])
    compare(side, by_clang, exactly=not CLAIMED[name].atan2)


def assembly(target: str, folder: Path, *flags: str) -> str:
    """What clang makes of the passes for another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: ARM[target])
        patch.setenv("CXX", str(as_compiler(folder / "cxx", "-target", target, *flags)))
        cxx, own_flags = source.compiler()
        command = [cxx, *own_flags, *source.flags_for("DEFAULT"), "-S"]
    made = []
    for name in source.COMPILED:
        made.append(folder / f"{name}.s")
        part = [*command, str(source.HERE / name), "-o", str(made[-1])]
        subprocess.run(part, check=True, capture_output=True, timeout=120, cwd=folder)
    return "".join(path.read_text(errors="replace") for path in made)


@pytest.mark.parametrize("target", ARM)
def test_compiled_for_arm_the_passes_are_vectors_and_need_no_library(target: str, tmp_path: Path) -> None:
    """Four numbers at once, and what C has; an atomic sum may be a function of the compiler's own library there."""
    text = assembly(target, tmp_path, "-moutline-atomics")
    assert len(re.findall(r"^\s+f(?:add|sub|mul|div|sqrt)(?:\.4s\s+v|\s+v\d+\.4s)", text, re.MULTILINE)) > 500
    assert re.search(r"^\s+fmla[.\s]", text, re.MULTILINE)
    called = set(re.findall(r"^\s+bl?\s+_?([A-Za-z_]\w*)$", text, re.MULTILINE))
    defined = set(re.findall(r"^_?([A-Za-z_]\w*):", text, re.MULTILINE))
    assert "memcpy" in called and called - defined <= {"memcpy", "memset", "bzero"}


def test_the_compiler_is_known_by_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a Mac clang is called c++."""
    for words, flags in {"Apple clang version 17.0.0": (), "g++ (GCC) 14.2.0": source.OF_GCC}.items():
        (tmp_path / "c++").write_text(f"#!/bin/sh\necho '{words}'\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
        assert source.compiler() == (str(tmp_path / "c++"), flags)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="every other machine has but one set of instructions")
@pytest.mark.parametrize(("instructions", "fuses"), [("DEFAULT", False), ("AVX2", True)])
def test_a_library_says_whether_it_rounds_products(instructions: str, fuses: bool, tmp_path: Path) -> None:
    """By which ranks with copies of the same weights know that they would differ."""
    source.compile_into(tmp_path / "passes.so", instructions)
    assert library.Library(tmp_path / "passes.so").fuses == fuses


@pytest.mark.parametrize(
    ("machine", "capability"),
    [("aarch64", "DEFAULT"), ("aarch64", "SVE256"), ("ppc64le", "VSX"), ("x86_64", "AVX2"), ("x86_64", "NO AVX")],
)
def test_what_a_wheel_brings_is_found(
    machine: str, capability: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever torch calls the instructions of a machine."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(library, "BUILT", tmp_path)
    monkeypatch.setattr(library, "Library", lambda path: path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for instructions in source.for_this_machine():
        (tmp_path / source.file_name(instructions)).touch()
    library.found.cache_clear()
    try:
        assert Path(str(library.load())).parent == tmp_path
    finally:
        library.found.cache_clear()
