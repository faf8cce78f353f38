"""The reads and writes of a step without its arithmetic: how close a step is to what memory alone takes.

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

from ppsf_dist.kernels.cpu.source import compiler, flags_for

WORD = 8
SLICE_P = 11


class _Tensor(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("g", "y", "z", "samples")],
        *[(name, ctypes.c_int64) for name in ("words", "sampled", "kept")],
    ]


@functools.cache
def _function() -> Any:
    source = Path(__file__).with_suffix(".cpp")
    flags = flags_for(torch.backends.cpu.get_cpu_capability())
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "traffic.so"
        subprocess.run([compiler(), *flags, "-fvisibility=default", str(source), "-o", str(made)], check=True)
        function = ctypes.CDLL(str(made)).traffic_of_step
    function.argtypes, function.restype = (ctypes.POINTER(_Tensor), ctypes.c_int64), ctypes.c_uint64
    return function


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
        tensors = (_Tensor * len(self.params))()
        for tensor, p in zip(tensors, self.params, strict=True):
            assert p.grad is not None
            state, written = self.state[p], p.numel() // SLICE_P * (p.element_size() + 2) // WORD
            tensor.g, tensor.y = p.grad.data_ptr(), p.data_ptr()
            tensor.z, tensor.samples = state["z"].data_ptr(), state["samples"].data_ptr()
            tensor.words, tensor.sampled = p.nbytes // WORD, state["samples"].numel()
            tensor.kept = written
        _function()(tensors, len(self.params))
