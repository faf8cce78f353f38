"""Steps of Triton's kernels but for the GPU that is not here: ``python -m tests.kernels.launched`` prints what of each.

Each launch goes through Triton's own launcher for sm_90, which looks at every argument, compiles, and finds again what
it has compiled; the GPU alone is missing, so that nothing is computed. The interpreter knows none of that.
"""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.compiled import TARGETS

STEPS = 4
RUNS: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("ProdigyPlusScheduleFree", torch.float32, {}),
    (
        "ProdigyPlusScheduleFree",
        torch.bfloat16,
        {"use_speed": True, "use_bias_correction": True, "split_groups_mean": True},
    ),
    ("Prodigy", torch.float32, {"use_bias_correction": True}),
    ("SGDScheduleFree", torch.float32, {"lr": 0.1}),
    ("RAdamScheduleFree", torch.bfloat16, {"silent_sgd_phase": False}),
)


class NoDevice:
    """A driver of Triton's for a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS["sm_90"])


def launched(patch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Of each run the kernels that two groups of a matrix and a vector launch, and how often each is compiled.

    Compiled is what the first two steps launch, and launched again by all others.
    """
    import triton
    from triton.runtime.jit import JITFunction

    # Before the environment says that Triton interprets, without which a CPU has none of its kernels.
    import ppsf_dist
    from ppsf_dist.engine import triton_numbers  # noqa: F401
    from ppsf_dist.kernels.triton import backend  # noqa: F401
    from ppsf_dist.kernels.triton.step_numbers import TritonNumbers
    from tests.harness.kernels import as_on_an_accelerator

    compiled: dict[str, set[int]] = {}
    launch, end = JITFunction.run, TritonNumbers.end

    def compile_only(self: Any, *arguments: Any, **options: Any) -> None:
        made = launch(self, *arguments, **{**options, "warmup": True})
        compiled.setdefault(self.fn.__name__, set()).add(id(made))

    def ends_as_it_began(self: Any, step: Any, totals: Tensor, after: Tensor) -> None:
        end(self, step, totals, after)
        after.copy_(step.numbers.values)

    triton.runtime.driver.set_active(NoDevice())
    patch.setattr(JITFunction, "run", compile_only)
    patch.setattr(TritonNumbers, "end", ends_as_it_began)
    as_on_an_accelerator(patch)
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setenv("PPSF_KERNELS", "triton")
    found = []
    for name, dtype, arguments in RUNS:
        compiled.clear()
        made = [nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(2) for shape in ((40, 64), (9,))]
        optimizer = getattr(ppsf_dist, name)([{"params": made[:2]}, {"params": made[2:]}], **arguments)
        after = []
        for step in range(STEPS):
            for p in made:
                p.grad = torch.ones(p.numel() + step, dtype=dtype)[step:].view_as(p)
            optimizer.step()
            after.append({name: len(kernels) for name, kernels in compiled.items()})
        assert after[1] == after[-1], (after[1], after[-1])
        found.append(after[-1])
    return found


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    warnings.simplefilter("ignore")
    with pytest.MonkeyPatch.context() as patch:
        print(json.dumps(launched(patch)))


if __name__ == "__main__":
    main()
