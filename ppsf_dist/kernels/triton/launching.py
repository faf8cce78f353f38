"""How kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def run(kernel: Any, programs: int, tables: Sequence[Tensor], *arguments: Any, **constants: Any) -> None:
    """Launch so many programs on the device where the tables are, which need not be the current one.

    Nothing is fused that does not say so: the bits are those of the eager kernels.
    """
    if not programs:
        return
    with torch.cuda.device_of(tables[0]):
        kernel[(programs,)](tables, *arguments, enable_fp_fusion=False, **constants)
