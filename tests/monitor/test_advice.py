"""What a monitor warns of, each once and with the cause that its numbers show; and what it is silent about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import Monitor, ProdigyPlusScheduleFree, averaged, recalibrate_batch_norm
from ppsf_dist.engine.reports import StepReport
from ppsf_dist.monitor.advice import Advice


def train(
    steps: int = 110,
    gradient: Callable[[int, Tensor], Tensor] | None = None,
    lr: Callable[[int], float] | None = None,
    model: nn.Module | None = None,
    evaluate: bool = True,
    clip: float | None = None,
    **arguments: Any,
) -> list[str]:
    """Train a linear regression; return what the monitor said."""
    torch.manual_seed(0)
    made = model or nn.Linear(8, 40)
    x, target = torch.randn(32, 8), torch.randn(32, 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = ProdigyPlusScheduleFree(made.parameters(), **arguments)
        caught.clear()
        with Monitor(optimizer, model=model):
            for step in range(1, steps + 1):
                if lr is not None:
                    optimizer.param_groups[0]["lr"] = lr(step)
                optimizer.zero_grad()
                (made(x) - target).square().mean().backward()
                for p in made.parameters():
                    assert p.grad is not None
                    p.grad = gradient(step, p.grad) if gradient else p.grad
                if clip is not None:
                    nn.utils.clip_grad_norm_(made.parameters(), clip)
                optimizer.step()
            if evaluate:
                with averaged(optimizer, made):
                    pass
    return [str(one.message) for one in caught if "lr=" not in str(one.message)]


def test_a_training_that_goes_well_hears_nothing() -> None:
    assert train(300) == []


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ({"gradient": lambda _, g: torch.zeros_like(g)}, "all its gradients are zero"),
        ({"gradient": lambda _, g: torch.randn_like(g), "d0": 1e-6, "prodigy_steps": 1}, "prodigy_steps=1 stopped it"),
        ({"d0": 10.0}, "so d0 is above it and d cannot fall; set d0 to"),
        ({"clip": 1e-3, "d0": 1.0}, "something clips or normalises them"),
        ({"lr": lambda _: 1e-4, "prodigy_steps": 1}, "lr is 0.0001, and multiplies the step"),
    ],
    ids=["zero gradients", "frozen", "d0 too high", "clipped", "lr"],
)
def test_d_still_at_d0_has_its_cause_named(cause: dict[str, Any], message: str) -> None:
    said = [one for one in train(**cause) if "still d0" in one]
    assert len(said) == 1 and message in said[0], said


def test_training_that_never_saw_its_average_is_told_at_the_end() -> None:
    said = train(evaluate=False)
    assert len(said) == 1 and said[0].startswith("eval() was never called")


def test_batch_norm_is_named_unless_its_statistics_were_taken_at_the_average() -> None:
    said = train(model=nn.Sequential(nn.Linear(8, 40), nn.BatchNorm1d(40)))
    assert len(said) == 1 and said[0].startswith("1 is a BatchNorm")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.BatchNorm1d(40))
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(optimizer, model=model):
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(8, 8)).square().mean().backward()
                optimizer.step()
            optimizer.eval()
            recalibrate_batch_norm(model, [torch.randn(8, 8) for _ in range(2)])


def growing(factor: float, steps: int) -> list[str]:
    model = nn.Linear(2, 2)
    advice = Advice(ProdigyPlusScheduleFree(model.parameters()), None)
    said, d = [], 1e-3
    for step in range(1, steps + 1):
        d *= factor
        group = {"d": d, "gradient_norm": 1.0 / step, "d_numerator": 1.0, "d_denom": 1.0}
        said += list(advice.on(StepReport(step, 0, None, (group,))))
    return said


def test_growth_without_end_is_named_once_and_settled_growth_is_not() -> None:
    said = growing(1.003, 1500)
    assert len(said) == 1 and "and still grows" in said[0]
    assert growing(1.0, 3000) == [] and growing(1.2, 50) == []
