"""What a ZeRO run has to equal: one process that steps fp32 weights with the same gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tests.deepspeed.engines import gradients_for, numbers
from tests.harness.models import NamedShapes, initial_weights, named_shapes
from tests.runs import Run, difference, make_optimizer, with_noise
from tests.switches import EVERY

STEPS = 6
SHAPES = named_shapes("small")
UNSTABLE = {"d_limiter": {"d": 2e-5, "weights": 2.5e-6}}
"""Here d multiplies rounding errors from step to step, in one process too: at most to so much."""


@functools.cache
def single(
    switch: str = "default", dtype: torch.dtype = torch.float32, *, groups: int = 2, steps: int = STEPS,
    noisy: bool = False,
) -> Run:  # fmt: skip
    """The run of one process whose fp32 weights start from weights in ``dtype`` and meet gradients in ``dtype``."""
    return single_run(SHAPES, dtype, groups=groups, steps=steps, noisy=noisy, switch=switch)


def single_run(
    shapes: NamedShapes, dtype: torch.dtype, *, groups: int, steps: int, switch: str, noisy: bool = False
) -> Run:
    start = {name: value.float() for name, value in initial_weights(shapes, dtype=dtype).items()}
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make_optimizer(parameters, groups, **EVERY[switch])
    run = Run(start, {}, {})
    for step, gradients in enumerate(gradients_for(shapes, steps, dtype)):
        full: dict[str, Tensor | None] = {name: gradient.float() for name, gradient in gradients.items()}
        for name, gradient in (with_noise(full, step) if noisy else full).items():
            parameters[name].grad = gradient
        optimizer.step()
        run.groups.append(numbers(optimizer))
    run.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return run


def single_without(dtype: torch.dtype, skip: int) -> Run:
    """One process that leaves out a step."""
    start = {name: value.float() for name, value in initial_weights(SHAPES, dtype=dtype).items()}
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make_optimizer(parameters, 2)
    run_ = Run(start, {}, {})
    for step, gradients in enumerate(gradients_for(SHAPES, STEPS, dtype)):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].float()
        if step != skip:
            optimizer.step()
        run_.groups.append(numbers(optimizer))
    run_.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return run_


def check(runs: list[Run], reference: Run, allowed: dict[str, float] | None = None) -> Run:
    """All ranks have the same numbers, bit for bit, and they are those of the reference. Returns a run of them."""
    run = runs[0]
    for other in runs[1:]:
        assert other.groups == run.groups, "ranks disagree about the numbers of a group"
        assert all(torch.equal(other.weights[name], value) for name, value in run.weights.items())
    assert run.numbers("k") == reference.numbers("k")
    apart = difference(run, reference)
    bound = {"d": 1e-6, "weights": 1e-5} if allowed is None else allowed
    assert apart["d"] <= bound["d"] and apart["weights"] <= bound["weights"], (apart, bound)
    if allowed is None:
        for name, value in reference.weights.items():
            assert float((run.weights[name] - value).abs().max()) <= 1e-6 * float(value.abs().max()), name
        for name in ("d_numerator", "d_denom"):
            ours, theirs = run.numbers(name), reference.numbers(name)
            worst = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
            scale = max(abs(value) for row in theirs for value in row)
            assert worst <= 1e-6 * scale, (name, worst, scale)
    return run
