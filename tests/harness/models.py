"""Parameter sets with awkward shapes, their initial weights, and gradients to feed an optimizer with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Shape = tuple[int, ...]
NamedShapes = list[tuple[str, Shape]]

# Names are usable as attributes, so that a ParameterDict takes them. Weights whose name starts with ZERO_PREFIX start
# at 0.
ZERO_PREFIX = "zero_"

MATRICES: NamedShapes = [("wide", (48, 64)), ("tall", (64, 48)), ("square", (48, 48))]
THIN: NamedShapes = [("two_rows", (2, 64)), ("one_column", (64, 1)), ("unfactored", (31, 31)), ("uneven", (7, 33))]
# Below 11 elements the every-11th sample of Prodigy is a single one.
VECTORS: NamedShapes = [("vector", (40,)), ("short", (5,)), ("one", (1,))]
CONVOLUTIONS: NamedShapes = [
    ("conv_out", (64, 32, 3, 3)),
    ("conv_in", (32, 64, 3, 3)),
    ("conv_first", (32, 3, 3, 3)),
    ("middle_small", (64, 8, 32)),
    ("first_small", (8, 64, 32)),
    ("last_large", (8, 32, 64)),
]
ZEROS: NamedShapes = [(ZERO_PREFIX + "matrix", (48, 64)), (ZERO_PREFIX + "vector", (40,)), (ZERO_PREFIX + "one", (1,))]
SCALAR: NamedShapes = [("scalar", ())]

KINDS: dict[str, NamedShapes] = {
    "matrices": MATRICES,
    "thin": THIN,
    "vectors": VECTORS,
    "convolutions": CONVOLUTIONS,
    "zeros": ZEROS,
    # One of each way in which a parameter can be treated: for tests that run on many layouts.
    "small": [MATRICES[0], MATRICES[1], THIN[3], VECTORS[0], VECTORS[1], VECTORS[2], CONVOLUTIONS[2], ZEROS[0]],
    "all": MATRICES + THIN + VECTORS + CONVOLUTIONS + ZEROS,
    # FSDP refuses parameters without dimensions.
    "single_process": MATRICES + THIN + VECTORS + CONVOLUTIONS + ZEROS + SCALAR,
}

# A start for Prodigy's d that suits these weights. From the default of 1e-6 the first moves are so small that rounding
# the weights hides them, and d stands still or follows noise.
D0 = 1e-4

GRADIENT_SCALE = 1e-2
# Each parameter's gradients are larger or smaller than GRADIENT_SCALE by up to this factor.
SCALE_SPREAD = 10.0
# Angle in radians by which the mean gradient turns in a step. Small: Prodigy raises d only while gradients agree.
DRIFT_PER_STEP = 0.05


def named_shapes(kind: str) -> NamedShapes:
    """The ``(name, shape)`` pairs of one of the ``KINDS``. Raises ``ValueError`` for any other kind."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}.")
    return list(KINDS[kind])


def initial_weights(shapes: NamedShapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of standard deviation ``1 / sqrt(fan-in)``, or 0 where the name says so, the same in every process."""
    return {
        name: torch.zeros(shape, dtype=dtype)
        if name.startswith(ZERO_PREFIX)
        else _normal(shape, _generator(name, seed, "weights")).div(math.sqrt(max(1, math.prod(shape[1:])))).to(dtype)
        for name, shape in shapes
    }


def gradient_sequence(
    shapes: NamedShapes,
    steps: int,
    seed: int = 0,
    *,
    noise: float = 0.5,
    dtype: torch.dtype = torch.float32,
    missing: Callable[[int, str], bool] | None = None,
) -> Iterator[dict[str, Tensor | None]]:
    """Yield the full gradients of each of ``steps`` steps.

    A gradient is a mean that turns slowly plus noise, as in training, so that Prodigy's ``d`` grows: started at
    ``D0``, from the second or third step on. With ``d_limiter`` it then grows by the limit in every step, whatever
    the sums are; to compare sums, switch the limiter off and take about ten steps, in which ``d`` doubles each time.

    A gradient depends on the seed, the name, the shape and the step alone, not on other parameters or the process.

    Args:
        noise: standard deviation of the noise, relative to that of the mean.
        dtype: dtype to which the gradients are rounded.
        missing: tells for a step, counted from 0, and a name whether that gradient is ``None``.
    """
    generators = {name: _generator(name, seed, "gradients") for name, _ in shapes}
    scales = {name: GRADIENT_SCALE * SCALE_SPREAD ** _between(-1.0, 1.0, generators[name]) for name, _ in shapes}
    means = {name: _normal(shape, generators[name]) for name, shape in shapes}
    for step in range(steps):
        gradients: dict[str, Tensor | None] = {}
        for name, shape in shapes:
            generator = generators[name]
            gradient = scales[name] * (means[name] + noise * _normal(shape, generator))
            turned = math.cos(DRIFT_PER_STEP) * means[name] + math.sin(DRIFT_PER_STEP) * _normal(shape, generator)
            means[name] = turned
            gradients[name] = None if missing is not None and missing(step, name) else gradient.to(dtype)
        yield gradients


def _generator(name: str, seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}/{name}".encode()))


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float32))
