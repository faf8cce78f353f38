"""Finds the compiled passes, or compiles them: what a wheel brings, what an earlier process has left, or the source.

The library is a plain shared object without dependencies; there is one for each set of instructions.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from ppsf_dist.kernels.codes import Piece
from ppsf_dist.kernels.cpu.source import BUILT, Unavailable, compile_into, file_name, instructions_of
from ppsf_dist.kernels.cpu.tables import GroupsTable, Job, MomentsTable, ParametersTable, PlanTable, Task

logger = logging.getLogger(__name__)

METHODS = ("prodigy_plus", "prodigy", "schedulefree")
"""Whose numbers it computes."""
TABLES = (Piece, Task, Job, PlanTable, MomentsTable, GroupsTable, ParametersTable)
"""What Python mirrors."""


class Library:
    """The functions of a loaded library. Each call lets other threads of Python run.

    Args:
        path: of the shared object.

    Attributes:
        fuses: whether products are added without a rounding of their own, which is one bit more or less of a weight.

    Raises:
        Unavailable: it was made from another source, or does not load.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"{path} does not load: {error}") from error
        sizes = (ctypes.c_int64 * len(TABLES))()
        functions.ppsf_sizes(sizes)
        if list(sizes) != [ctypes.sizeof(table) for table in TABLES]:
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
        self.add_results = function("add_results", plan, count, count, count, ctypes.c_int)
        self.update_moments = function("update_moments", plan, moments, count, count)
        self.fill_factors = function("fill_factors", plan, moments, count, count)
        self.write_moments = function("write_moments", plan, moments)
        self.is_packed = function("is_packed", plan, count, returns=ctypes.c_int)
        self.pack = function("pack", plan, count)
        groups, of, address = ctypes.POINTER(GroupsTable), ctypes.POINTER(ParametersTable), ctypes.c_void_p
        self.begin = {name: function(f"begin_{name}", groups) for name in METHODS}
        self.learn = {name: function(f"learn_{name}", groups, address) for name in ("prodigy",)}
        self.end = {name: function(f"end_{name}", groups, address, address) for name in METHODS}
        self.fill_coefficients = function("fill_coefficients", groups, of)
        self.fill_keys = function("fill_keys", of, ctypes.c_uint32)
        self.fill_scales = function("fill_scales", groups, of)
        self.find_cause = function("find_cause", groups, of, address, returns=ctypes.c_int)
        self.contribute = function("contribute", groups, of, address, address, address, address)
        self.fill_gates = function("fill_gates", groups, of, address, address)
        self.fuses = bool(function("fuses", returns=ctypes.c_int)())


def load() -> Library:
    """The library for this process's CPU. A process looks for it once.

    Raises:
        Unavailable: there is none, and none can be made.
    """
    known = found()
    if isinstance(known, Unavailable):
        raise Unavailable(str(known))
    return known


@functools.cache
def found() -> Library | Unavailable:
    """What ``load`` gives or raises."""
    try:
        return _find()
    except Unavailable as error:
        return error


def _find() -> Library:
    instructions = instructions_of(torch.backends.cpu.get_cpu_capability())
    name = file_name(instructions)
    shipped = BUILT / name
    if shipped.exists():
        return Library(shipped)
    kept = cache_folder() / name
    if not kept.exists():
        begin = time.perf_counter()
        compile_into(kept, instructions)
        logger.info("compiled the kernels into %s in %.1f s", kept, time.perf_counter() - begin)
    return Library(kept)


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``PPSF_CACHE``, or ``ppsf_dist`` in the user's cache folder.

    Raises:
        Unavailable: the user has no home, as in some containers.
    """
    given = os.environ.get("PPSF_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppsf_dist"
    except RuntimeError as error:
        raise Unavailable(
            f"there is no home folder to compile them into ({error}): name one with PPSF_CACHE"
        ) from error
