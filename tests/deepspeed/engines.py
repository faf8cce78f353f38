"""Real DeepSpeed engines on gloo and CPU that feed an optimizer with given gradients."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.harness.counting import Collectives, count_collectives
from tests.harness.models import D0, NamedShapes, gradient_sequence, initial_weights
from tests.runs import Run

FROZEN = "frozen"


def deepspeed_on_cpu() -> Any:
    """The module, without the C++ extension that it would compile for a minute."""
    if dist.is_initialized():
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
    import deepspeed
    import deepspeed.ops

    import ppsf_dist.deepspeed  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls functions that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    return deepspeed


class GivenGradients(nn.Module):
    """Its loss has the gradients that it is called with.

    A frozen parameter lies among the others, and a buffer counts the calls.
    """

    calls: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for position, (name, value) in enumerate(weights.items()):
            if position == 1:
                self.register_parameter(FROZEN, nn.Parameter(torch.ones(5), requires_grad=False))
            self.register_parameter(name, nn.Parameter(value.float().clone()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, gradients: dict[str, Tensor | None]) -> Tensor:
        self.calls += 1
        total = torch.zeros(())
        for name, param in self.named_parameters():
            gradient = None if name == FROZEN else gradients[name]
            if gradient is not None:
                total = total + (param * gradient).float().sum()
        return total


def config(stage: int, dtype: torch.dtype = torch.float32, **zero: Any) -> dict[str, Any]:
    """A config for one micro batch, without clipping."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **zero},
    }
    if stage == 3:
        settings["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    return settings


def make_groups(model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Trainable parameters dealt out to so many groups; the frozen one is in the first."""
    named = dict(model.named_parameters())
    values = [p for name, p in named.items() if name != FROZEN]
    groups = [{"params": values[index::count]} for index in range(count)]
    groups[0]["params"].insert(1, named[FROZEN])
    return groups


def make_engine(
    shapes: NamedShapes,
    settings: dict[str, Any],
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    zero_init: bool = False,
    make: Callable[[Any], torch.optim.Optimizer] | None = None,
    named: bool = False,
    **switches: Any,
) -> Any:
    """The engine of a model with given gradients.

    Its optimizer is made by ``make``, or ``named`` in the settings, or a ProdigyPlusScheduleFree with ``switches``.
    """
    deepspeed = deepspeed_on_cpu()
    if make is None and not named:
        settings = {
            **settings,
            "optimizer": {"type": "ProdigyPlusScheduleFree", "params": {"d0": D0, **switches}},
        }
    start = initial_weights(shapes, dtype=dtype)
    init = deepspeed.zero.Init(config_dict_or_path=settings) if zero_init else nullcontext()
    with init:
        model = GivenGradients(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=make_groups(model, groups), optimizer=make, config=settings
        )
    return engine


def count_in_steps(optimizer: torch.optim.Optimizer) -> list[Collectives]:
    """The collectives of each call of ``step()`` from now on."""
    counting = ExitStack()
    counted: list[Collectives] = []
    optimizer.register_step_pre_hook(lambda *_: counted.append(counting.enter_context(count_collectives())))
    optimizer.register_step_post_hook(lambda *_: counting.close())
    return counted


def gradients_for(shapes: NamedShapes, steps: int, dtype: torch.dtype, **kwargs: Any) -> Iterator[dict[str, Tensor]]:
    return gradient_sequence(shapes, steps, dtype=dtype, **kwargs)  # type: ignore[return-value]


def feed(engine: Any, gradients: Mapping[str, Tensor | None]) -> None:
    """One micro step. The gradients of the ranks differ; their mean is the given one, exactly in every dtype."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    shared = {
        name: None if g is None else g * ranks if rank == ranks - 1 else torch.zeros_like(g)
        for name, g in gradients.items()
    }
    loss = engine(shared)
    engine.backward(loss)
    engine.step()


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Whole trained weights as the optimizer holds them (fp32), by way of DeepSpeed's own interface."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        copies = {
            id(low): high
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        return {n: copies[id(p)].detach().clone() for n, p in trained(engine) if id(p) in copies}
    if optimizer is engine.basic_optimizer:
        return {name: param.detach().clone() for name, param in trained(engine)}
    return {name: safe_get_full_fp32_param(param).view(shape_of(param)) for name, param in trained(engine)}


def model_weights(engine: Any) -> dict[str, Tensor]:
    """Whole trained weights as the model computes with them."""
    import deepspeed

    params = [param for _, param in trained(engine)]
    with deepspeed.zero.GatheredParameters(params) if hasattr(params[0], "ds_id") else nullcontext():
        return {name: param.detach().clone() for name, param in trained(engine)}


def trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in engine.module.named_parameters() if param.requires_grad]


def shape_of(param: Any) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


def numbers(optimizer: Any) -> list[dict[str, Any]]:
    optimizer.get_d()
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def run_engine(
    shapes: NamedShapes,
    steps: int,
    settings: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    through_model: bool = False,
    micro_steps: int = 1,
    **kwargs: Any,
) -> Run:
    """Train on given gradients and return what is left."""
    engine = make_engine(shapes, settings, dtype=dtype, **kwargs)
    run = Run({}, {}, {})
    for gradients in gradients_for(shapes, steps, dtype):
        for _ in range(micro_steps):
            feed(engine, gradients)
        run.groups.append(numbers(engine.basic_optimizer))
    run.weights = model_weights(engine) if through_model else full_weights(engine)
    engine.destroy()
    return run
