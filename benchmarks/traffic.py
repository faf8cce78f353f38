"""The reads and writes of a step without its arithmetic, and its loops without all else: how close a step is to both.

With a factored second moment and Schedule-Free a step reads the gradient in each of three passes, y and z in the last,
which writes both, and Prodigy's samples (1/11 of the elements: z in its dtype, p0 and s in bf16).
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppsf_dist.kernels.cpu.source import LINK, compiler, flags_for

WORD = 8
SLICE_P = 11


class _Tensor(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("g", "y", "z", "samples")],
        *[(name, ctypes.c_int64) for name in ("words", "sampled", "kept", "rows", "columns")],
        ("factors", ctypes.c_void_p),
    ]


@functools.cache
def _library() -> Any:
    source = Path(__file__).with_suffix(".cpp")
    cxx, own_flags = compiler()
    flags = (*own_flags, *flags_for(torch.backends.cpu.get_cpu_capability()), *LINK, "-fvisibility=default")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "traffic.so"
        subprocess.run([cxx, *flags, str(source), "-o", str(made)], check=True)
        library = ctypes.CDLL(str(made))
    for function in (library.traffic_of_step, library.loops_of_step):
        function.argtypes, function.restype = (ctypes.POINTER(_Tensor), ctypes.c_int64), ctypes.c_uint64
    return library


class Traffic:
    """Moves what a step of ``ProdigyPlusScheduleFree`` moves, by one thread. The weights are of no use afterwards.

    Args:
        params: contiguous, on the CPU, with gradients.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        if params[0].device.type != "cpu":
            raise ValueError("what memory alone takes is measured on a CPU")
        self.params = params
        self.state: dict[Any, dict[str, torch.Tensor]] = {}
        for p in params:
            words = p.numel() // SLICE_P * (p.element_size() + 4) // WORD
            samples = torch.zeros(words, dtype=torch.int64)
            self.state[p] = {"z": torch.empty_like(p.detach()).zero_(), "samples": samples}

    def step(self) -> None:
        _library().traffic_of_step(self._tensors(), len(self.params))

    def _tensors(self) -> Any:
        tensors = (_Tensor * len(self.params))()
        for tensor, p in zip(tensors, self.params, strict=True):
            assert p.grad is not None
            state, written = self.state[p], p.numel() // SLICE_P * (p.element_size() + 2) // WORD
            tensor.g, tensor.y = p.grad.data_ptr(), p.data_ptr()
            tensor.z, tensor.samples = state["z"].data_ptr(), state["samples"].data_ptr()
            tensor.words, tensor.sampled = p.nbytes // WORD, state["samples"].numel()
            tensor.kept = written
        return tensors


class Loops(Traffic):
    """The three passes of a default step over whole matrices, written plainly, by one thread.

    Squares by row and column and Prodigy's sums, then the norm of the direction, then y, z and samples. Nothing finds
    tensors, checks or cuts. The weights are of no use afterwards.

    Args:
        params: fp32, contiguous, on the CPU, with gradients.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params)
        if any(p.dtype != torch.float32 or p.dim() > 2 for p in params):
            raise ValueError("the loops alone are measured on matrices and vectors in fp32")
        self._factors = [torch.zeros(rows + columns) for rows, columns in map(self._sides, params)]

    @staticmethod
    def _sides(p: torch.Tensor) -> tuple[int, int]:
        columns = p.shape[-1] if p.dim() else 1
        return p.numel() // columns, columns

    def step(self) -> None:
        tensors = self._tensors()
        for tensor, p, factors in zip(tensors, self.params, self._factors, strict=True):
            (tensor.rows, tensor.columns), tensor.factors = self._sides(p), factors.data_ptr()
        _library().loops_of_step(tensors, len(self.params))
