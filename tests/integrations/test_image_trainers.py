"""The loops of kohya's sd-scripts and of OneTrainer, written as they are there, with the class that a user names.

Neither can be installed from a package index, so what they do with an optimizer is imitated; nothing is patched.
"""

from __future__ import annotations

import ast
import importlib
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree

TYPE = "ppsf_dist.ProdigyPlusScheduleFree"
STEPS = 6


def adapter() -> nn.Module:
    """Pairs of low rank beside frozen weights; B begins at zero, as in LoRA."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(3)]).requires_grad_(False)
    for layer in model:
        layer.register_parameter("a", nn.Parameter(torch.randn(40, 4) / 6))
        layer.register_parameter("b", nn.Parameter(torch.zeros(4, 40)))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: Any, seed: int) -> Tensor:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(seed))
    target = x.roll(1, dims=1)
    for layer in model:
        x = layer(x) + x @ layer.a @ layer.b
    return (x - target).square().mean()


def by_name(params: Any, arguments: list[str]) -> Any:
    """``--optimizer_type`` and ``--optimizer_args`` of kohya."""
    module, _, name = TYPE.rpartition(".")
    given = {key: ast.literal_eval(value) for key, value in (word.split("=") for word in arguments)}
    return getattr(importlib.import_module(module), name)(params, lr=1.0, **given)


def straight() -> list[Tensor]:
    model = adapter()
    optimizer = ProdigyPlusScheduleFree(trained(model), d0=1e-3)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trained(model)]


def test_the_loop_of_kohya() -> None:
    """It knows a schedule-free class by its name, and then calls train() and eval() and shows d * lr."""
    assert TYPE.lower().endswith("schedulefree")
    model = adapter()
    accelerator = Accelerator(cpu=True)
    inner = by_name([{"params": trained(model)}], ["d0=1e-3", "use_speed=False"])
    optimizer = accelerator.prepare(inner)
    optimizer.train()
    sizes = []
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        group = optimizer.optimizer.param_groups[-1]
        sizes.append(group["d"] * group["lr"])
        if step % 2:  # It saves and samples here.
            optimizer.eval()
            optimizer.train()
    assert sizes[-1] > sizes[0] == 1e-3
    for p, expected in zip(trained(model), straight(), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


def test_the_fused_loop_of_kohya() -> None:
    model = adapter()
    optimizer = by_name([{"params": trained(model)}], ["d0=1e-3", "fused_back_pass=True"])
    for group in optimizer.param_groups:
        for p in group["params"]:

            def hook(tensor: Tensor, group: dict[str, Any] = group) -> None:
                optimizer.step_param(tensor, group)
                tensor.grad = None

            p.register_post_accumulate_grad_hook(hook)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in trained(model))
    for p, expected in zip(trained(model), straight(), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-8)


def test_the_fused_loop_of_onetrainer() -> None:
    """It asks whether it may, clips each gradient, calls step_parameter with an index, and never step()."""
    model = adapter()
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in trained(model)], d0=1e-3, fused_back_pass=True)
    supports: Any = optimizer.supports_fused_back_pass
    assert supports() if callable(supports) else supports
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):

            def hook(tensor: Tensor, group: dict[str, Any] = group, i: int = i) -> None:
                nn.utils.clip_grad_norm_(tensor, 1)
                optimizer.step_parameter(tensor, group, i)
                tensor.grad = None

            p.register_post_accumulate_grad_hook(hook)
    optimizer.train()
    losses = []
    for step in range(40):
        loss = loss_of(model, step)
        losses.append(loss.item())
        loss.backward()
    optimizer.eval()
    assert optimizer.param_groups[0]["k"] == 41 and losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["d", "d_prev", "d0", "d_coef", "d_numerator", "d_denom", "effective_lr", "k"])
def test_what_their_logs_read_are_plain_numbers(name: str) -> None:
    model = adapter()
    optimizer = ProdigyPlusScheduleFree(trained(model))
    loss_of(model, 0).backward()
    optimizer.step()
    assert type(optimizer.param_groups[0][name]) in (int, float)
