"""Finds the compiled passes, or compiles them: what a wheel brings, what an earlier process has left, or the source.

The library is a plain shared object without dependencies; there is one for each set of instructions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppsf_dist.kernels.cpu.tables import Job, MomentsTable, Piece, PlanTable, Task

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
BUILT = HERE / "built"
"""What a wheel brings."""
SOURCES = ("passes.cpp", "block.h", "element.h", "plan.h")
COMPILE = (
    "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-std=c++17", "-fopenmp-simd", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-fPIC",
    "-shared", "-nodefaultlibs",
)  # fmt: skip
"""No -ffast-math: a library linked with it turns denormal numbers off for the whole process. No contraction: every set
of instructions, and torch, gives the same bits."""

INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
"""Flags for what ``torch.backends.cpu.get_cpu_capability()`` says."""


class Unavailable(Exception):
    """The passes cannot run here. The message says why."""


class Library:
    """The functions of a loaded library. Each call lets other threads of Python run.

    Args:
        path: of the shared object.

    Raises:
        Unavailable: it was made from another source, or does not load.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"{path} does not load: {error}") from error
        sizes = (ctypes.c_int64 * 5)()
        functions.ppsf_sizes(sizes)
        if list(sizes) != [ctypes.sizeof(table) for table in (Piece, Task, Job, PlanTable, MomentsTable)]:
            raise Unavailable(f"{path} was made from another source")
        plan, moments, count = ctypes.POINTER(PlanTable), ctypes.POINTER(MomentsTable), ctypes.c_int64
        pieces, tasks, job = ctypes.POINTER(Piece), ctypes.POINTER(Task), ctypes.POINTER(Job)

        def function(name: str, *arguments: Any, returns: Any = None) -> Any:
            found = getattr(functions, f"ppsf_{name}")
            found.argtypes, found.restype = arguments, returns
            return found

        self.cut = function("cut", pieces, count, tasks, count, ctypes.POINTER(count), returns=count)
        self.run = function("run", plan, ctypes.c_int, job)
        self.add_partial = function("add_partial", plan, count, count)
        self.add_results = function("add_results", plan, count, count, ctypes.c_int)
        self.update_moments = function("update_moments", plan, moments)
        self.fill_factors = function("fill_factors", plan, moments)
        self.write_moments = function("write_moments", plan, moments)
        self.is_packed = function("is_packed", plan, count, returns=ctypes.c_int)
        self.pack = function("pack", plan, count)


@functools.cache
def load() -> Library:
    """The library for this process's CPU.

    Raises:
        Unavailable: there is none, and none can be made.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    name = file_name(instructions)
    shipped = BUILT / name
    if shipped.exists():
        return Library(shipped)
    kept = cache_folder() / name
    if not kept.exists():
        compile_into(kept, instructions)
    return Library(kept)


def file_name(instructions: str) -> str:
    """What a library is called: for which machine it is, and from which source it was made."""
    digest = hashlib.sha256(" ".join(flags_for(instructions)).encode())
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    return f"passes-{platform.machine()}-{instructions.lower()}-{digest.hexdigest()[:16]}.so"


def flags_for(instructions: str) -> Sequence[str]:
    """The compiler's flags for a set of instructions; on other machines than x86 the compiler knows its own."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (*COMPILE, *(INSTRUCTIONS.get(instructions, ()) if on_x86 else ()))


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``PPSF_CACHE``, or ``ppsf_dist`` in the user's cache folder."""
    given = os.environ.get("PPSF_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppsf_dist"


def compiler() -> str:
    """The C++ compiler: ``CXX``, or the first of the usual names that is there.

    Raises:
        Unavailable: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise Unavailable("there is no C++ compiler (CXX, c++, g++ or clang++)")


def compile_into(path: Path, instructions: str) -> None:
    """Compile the passes. Processes that do so at once do not disturb each other: the last one's file stays.

    Raises:
        Unavailable: there is no compiler, it fails, or the folder cannot be written.
    """
    command = [compiler(), *flags_for(instructions), str(HERE / SOURCES[0]), "-lc"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="compiling-") as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=120)
            os.replace(made, path)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{command[0]} cannot compile them: {_last_line(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"they cannot be compiled into {path.parent}: {error}") from error
    logger.info("compiled %s", path)


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "it says nothing")
