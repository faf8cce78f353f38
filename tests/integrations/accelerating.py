"""What a person does with Accelerate: ``python -m tests.integrations.accelerating KIND FOLDER``, on 1 or 2 ranks.

Accelerate keeps a state of its process, so each kind has a process of its own. Rank 0 writes what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ppsf_dist import ProdigyPlusScheduleFree, averaged

D0 = 1e-3
STEPS = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 3))


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 40, generator=generator), torch.randn(16, 3, generator=generator)


def loss_of(model: nn.Module, share: slice = slice(None)) -> Tensor:
    inputs, targets = make_data()
    loss: Tensor = (model(inputs[share]) - targets[share]).square().mean()
    return loss


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]


def shards_by_accelerate(accelerator: Accelerator) -> None:
    """Let Accelerate take this CPU for an accelerator on which it knows FSDP2; its own code does the rest."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    accelerator.state.distributed_type = DistributedType.FSDP


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    made = make_model()
    optimizer: Any = ProdigyPlusScheduleFree(made.parameters(), d0=D0)
    if kind == "fsdp2":
        shards_by_accelerate(accelerator)
    model, optimizer = accelerator.prepare(made, optimizer)
    if kind == "fsdp2":
        # To prepare an optimizer brings back what Accelerate takes this machine for.
        accelerator.state.distributed_type = DistributedType.FSDP
    rank, ranks = accelerator.process_index, accelerator.num_processes

    def train() -> None:
        for _ in range(STEPS):
            accelerator.backward(loss_of(model, slice(rank, None, ranks)))
            optimizer.step()
            optimizer.zero_grad()

    def loss() -> float:
        with torch.no_grad():
            return loss_of(model).item()

    found: dict[str, Any] = {"ranks": ranks, "model": type(model).__name__, "wrapper": type(optimizer).__name__}
    train()
    found["y"] = loss()
    accelerator.save_state(str(folder / "training"))
    with averaged(optimizer, model):
        found["x"] = loss()
        accelerator.save_state(str(folder / "average"))
        if kind != "fsdp2":
            accelerator.save_model(model, str(folder / "model"))
    accelerator.wait_for_everyone()
    optimizer.eval()
    found["eval"] = loss()
    optimizer.train()
    found["train"] = loss()
    if kind != "fsdp2":
        # Swaps to and fro cost digits: training goes on from what was saved.
        saved = make_model()
        saved.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        found["saved"] = loss_of(saved).item()
    for name in ("training", "average"):
        accelerator.load_state(str(folder / name))
        optimizer.train()
        found[f"loaded {name}"] = loss()
        train()
        found[f"resumed {name}"] = [w.double().sum().item() for w in whole(model)], optimizer.optimizer.get_d()
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
