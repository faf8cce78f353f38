"""Whether there are Triton kernels for a device. Imports Triton only when somebody asks."""

from __future__ import annotations

import os

import torch

from ppsf_dist.kernels.cpu.source import Unavailable
from ppsf_dist.kernels.interface import Kernels
from ppsf_dist.kernels.numbers import NumbersKernels


def load(device: torch.device) -> Kernels:
    """The kernels for a device. On a CPU they run in Triton's interpreter, which is for tests.

    Raises:
        Unavailable: Triton is not installed, has nothing to compile for, or was not told to interpret.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("on a CPU Triton only interprets, with TRITON_INTERPRET=1 in the environment from the start")
    try:
        from ppsf_dist.kernels.triton.backend import TritonKernels
    except ImportError as error:
        raise Unavailable(f"Triton cannot be imported ({error}): pip install triton") from error
    return TritonKernels()


def numbers() -> NumbersKernels:
    """What computes the numbers of groups by Triton, where ``load`` has found it."""
    from ppsf_dist.kernels.triton.step_numbers import TRITON_NUMBERS

    return TRITON_NUMBERS
