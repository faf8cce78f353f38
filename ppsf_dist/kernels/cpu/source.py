"""How the passes are compiled. Imports neither torch nor this package: the build of a wheel loads this file alone."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE / "built"
"""What a wheel brings."""
COMPILED = ("passes.cpp", "bf16.cpp")
"""Compiled at the same time, which is what first use waits for."""
SOURCES = (
    *COMPILED, "tasks.h", "pass_1.h", "pass_2.h", "pass_3.h", "common.h", "moments.h", "walk.h", "block.h",
    "numbers_of_prodigy_plus.h", "numbers_of_prodigy.h", "numbers_of_schedulefree.h", "numbers.h", "element.h",
    "plan.h",
)  # fmt: skip
COMPILE = (
    "-O1", "-ftree-vectorize", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-fPIC",
)  # fmt: skip
"""-O1, because vectors are what counts, and GCC compiles in two thirds of the time.

No -ffast-math: a library linked with it turns denormal numbers off for the whole process. No contraction: every set of
instructions, and torch, gives the same bits."""

LINK = ("-shared", "-nodefaultlibs")

OF_GCC = ("-fvect-cost-model=dynamic", "--param=vect-epilogues-nomask=0")
"""What clang does not know. What vectors leave over at the end of a loop is not made vectors again, which costs GCC a
tenth and makes no step faster."""

OF_ARM = ("-mno-outline-atomics",)
"""An atomic sum is instructions, not a function of a library that is not linked."""

INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
"""Flags for what ``torch.backends.cpu.get_cpu_capability()`` says."""


class Unavailable(Exception):
    """The passes cannot run here. The message says why."""


def for_this_machine() -> Sequence[str]:
    """The sets of instructions that a wheel for this kind of machine brings."""
    return tuple(INSTRUCTIONS) if _is_x86() else ("DEFAULT",)


def instructions_of(capability: str) -> str:
    """The set of instructions for what torch says of this CPU; one for all machines but x86 ("SVE256" on some)."""
    return capability if capability in for_this_machine() else "DEFAULT"


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def file_name(instructions: str) -> str:
    """What a library is called: for which machine it is, and from which source it was made, by whatever compiler."""
    digest = hashlib.sha256(" ".join((*flags_for(instructions), *OF_GCC, *LINK)).encode())
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    return f"passes-{platform.machine()}-{instructions.lower()}-{digest.hexdigest()[:16]}.so"


def flags_for(instructions: str) -> Sequence[str]:
    """The flags of any compiler for a set of instructions; on other machines than x86 the compiler knows its own."""
    if _is_x86():
        return (*COMPILE, *INSTRUCTIONS.get(instructions, ()))
    return (*COMPILE, *OF_ARM) if platform.machine().lower() in ("aarch64", "arm64") else COMPILE


def compiler() -> tuple[str, Sequence[str]]:
    """The C++ compiler and its own flags: ``CXX``, or the first of the usual names that is there.

    Raises:
        Unavailable: there is none, or it does not start.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            # On a Mac, clang is called c++ and g++, too.
            return found, () if "clang" in _run([found, "--version"]) else OF_GCC
    raise Unavailable("there is no C++ compiler (CXX, c++, g++ or clang++)")


def compile_into(path: Path, instructions: str) -> None:
    """Compile the passes. Processes that do so at once do not disturb each other: the last one's file stays.

    Raises:
        Unavailable: there is no compiler, it fails, the folder cannot be written, or no thread can be started.
    """
    cxx, own_flags = compiler()
    flags = (*own_flags, *flags_for(instructions))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The threads end before the folder does.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="compiling-") as folder, ThreadPoolExecutor() as pool:
            made, *objects = (str(Path(folder) / name) for name in (path.name, *(f"{source}.o" for source in COMPILED)))
            commands = [[cxx, *flags, "-c", str(HERE / of), "-o", to] for of, to in zip(COMPILED, objects, strict=True)]
            list(pool.map(_run, commands))
            _run([cxx, *LINK, *objects, "-lc", "-o", made])
            os.replace(made, path)
    except (OSError, RuntimeError) as error:
        # RuntimeError: the process may start no more threads.
        raise Unavailable(f"they cannot be compiled into {path.parent}: {error}") from error


def _run(command: Sequence[str]) -> str:
    """What a compiler says.

    Raises:
        Unavailable: it fails, or takes two minutes.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{command[0]} cannot compile them: {_last_line(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot compile them: {error}") from error


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "it says nothing")
