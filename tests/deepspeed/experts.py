"""A model with experts whose gradients are given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.deepspeed.engines import deepspeed_on_cpu, full_weights, gradients_for, numbers
from tests.harness.models import D0, NamedShapes, initial_weights
from tests.runs import Run, make_optimizer

EXPERTS = 2
DENSE: NamedShapes = [("dense", (48, 64)), ("gate", (EXPERTS, 33)), ("vector", (40,))]
OF_EXPERT: NamedShapes = [("weight", (35, 33)), ("bias", (35,))]
SHAPES: NamedShapes = DENSE + [(f"expert{i}_{name}", shape) for i in range(EXPERTS) for name, shape in OF_EXPERT]


class Mixture(nn.Module):
    """Dense parameters and DeepSpeed's mixture of experts, of which each rank holds one."""

    def __init__(self, weights: dict[str, Tensor], moe: nn.Module, expert: int) -> None:
        super().__init__()
        for name in ("dense", "vector"):
            self.register_parameter(name, nn.Parameter(weights[name].clone()))
        self.moe = moe
        layer: Any = moe
        self.named: dict[str, Any] = {"dense": self.dense, "vector": self.vector}
        self.named["gate"] = layer.deepspeed_moe.gate.wg.weight
        linear = layer.deepspeed_moe.experts.deepspeed_experts[0]
        self.named |= {f"expert{expert}_weight": linear.weight, f"expert{expert}_bias": linear.bias}
        with torch.no_grad():
            for name, param in self.named.items():
                param.copy_(weights[name])

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for name, param in self.named.items():
            total = total + (param * gradients[name]).float().sum()
        return total


def share_of(name: str) -> float:
    """Factor of this rank's gradient; DeepSpeed divides the sum by the number of all ranks, for experts too."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    copies = EXPERTS if name.startswith("expert") else 1
    return float(ranks) if rank >= ranks - copies else 0.0


def make_mixture(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """The engine of a mixture."""
    deepspeed = deepspeed_on_cpu()
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    weights = initial_weights(SHAPES, dtype=dtype)
    moe = MoE(33, nn.Linear(33, 35), num_experts=EXPERTS, ep_size=EXPERTS)
    model = Mixture({n: w.float() for n, w in weights.items()}, moe, expert=dist.get_rank() % EXPERTS)
    named = [model.named[name] for name, _ in DENSE]
    experts = [param for name, param in model.named.items() if name.startswith("expert")]
    settings = {**settings, "optimizer": {"type": "ProdigyPlusScheduleFree", "params": {"d0": D0}}}
    group = {"params": named + experts, "name": "dense"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=split_params_into_different_moe_groups_for_optimizer(group), config=settings
        )
    return engine


def train_mixture(engine: Any, dtype: torch.dtype, first: int, last: int) -> Run:
    """Train on given gradients; the weights are those of this rank."""
    run = Run({}, {}, {})
    for step, gradients in enumerate(gradients_for(SHAPES, last, dtype)):
        if step >= first:
            engine.backward(engine({name: g * share_of(name) for name, g in gradients.items()}))
            engine.step()
            run.groups.append(numbers(engine.basic_optimizer))
    names = {id(param): name for name, param in engine.module.named.items()}
    parameters = dict(engine.module.named_parameters())
    run.weights = {names[id(parameters[name])]: value for name, value in full_weights(engine).items()}
    return run


def run_mixture(steps: int, settings: dict[str, Any], dtype: torch.dtype) -> Run:
    engine = make_mixture(settings, dtype)
    run = train_mixture(engine, dtype, 0, steps)
    engine.destroy()
    return run


def resume_mixture(folder: Path, steps: int, settings: dict[str, Any], dtype: torch.dtype) -> Run:
    """The same, saved in the middle and gone on with by another engine."""
    first = make_mixture(settings, dtype)
    train_mixture(first, dtype, 0, steps // 2)
    first.save_checkpoint(str(folder), tag="half")
    first.destroy()
    second = make_mixture(settings, dtype)
    second.load_checkpoint(str(folder), tag="half")
    run = train_mixture(second, dtype, steps // 2, steps)
    second.destroy()
    return run


def single_mixture(steps: int, dtype: torch.dtype) -> Run:
    """The same with all experts in one process."""
    start = {name: value.float() for name, value in initial_weights(SHAPES, dtype=dtype).items()}
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make_optimizer({n: p for n, p in parameters.items() if not n.startswith("expert")})
    optimizer.add_param_group({"params": [p for n, p in parameters.items() if n.startswith("expert")]})
    run = Run(start, {}, {})
    for gradients in gradients_for(SHAPES, steps, dtype):
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.float()
        optimizer.step()
        run.groups.append(numbers(optimizer))
    run.weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return run
