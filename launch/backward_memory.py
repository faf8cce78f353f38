"""How much gradient memory ``step_in_backward`` saves: the largest sum of gradient bytes alive in a backward pass.

On one process, where each parameter is stepped on its own::

    python launch/backward_memory.py

With ``fully_shard``, where each block is stepped when its gradients are reduced (bytes are those of one rank)::

    torchrun --nproc-per-node 2 launch/backward_memory.py

On an accelerator it also prints the peak of allocated memory.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import step_in_backward

MIB = 1 << 20


class Alive:
    """The memory of gradients, for as long as anybody holds it."""

    def __init__(self) -> None:
        self._sizes: dict[StorageWeakRef, int] = {}

    def see(self, gradient: Tensor) -> None:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        storage = local.untyped_storage()
        self._sizes[StorageWeakRef(storage)] = storage.nbytes()

    @property
    def bytes(self) -> int:
        self._sizes = {memory: size for memory, size in self._sizes.items() if not memory.expired()}
        return sum(self._sizes.values())


def make_model(width: int, depth: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)]
    model = nn.Sequential(*blocks).to(device)
    if dist.is_initialized():
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def peak_bytes(width: int, depth: int, device: torch.device, *, in_backward: bool) -> tuple[int, int]:
    """The most gradient bytes alive at any time in two steps; the most memory allocated (0 on a CPU)."""
    model = make_model(width, depth, device)
    parameters = list(model.parameters())
    optimizer = ProdigyPlusScheduleFree(parameters, fused_back_pass=in_backward)
    peak, alive = 0, Alive()

    def count(_: Tensor) -> None:
        nonlocal peak
        for p in parameters:
            if p.grad is not None:
                alive.see(p.grad)
        peak = max(peak, alive.bytes)

    for parameter in parameters:
        # Hooks run in the order of their registration: this one before the gradient is used and freed.
        parameter.register_post_accumulate_grad_hook(count)
    if in_backward:
        step_in_backward(model, optimizer)
    for step in range(2):
        if step and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model(torch.ones(4, width, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="features of each block")
    parser.add_argument("--depth", type=int, default=8, help="number of blocks")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    for in_backward in (False, True):
        gradients, allocated = peak_bytes(options.width, options.depth, device, in_backward=in_backward)
        if not dist.is_initialized() or dist.get_rank() == 0:
            how = "step_in_backward" if in_backward else "optimizer.step() "
            memory = f", {allocated / MIB:9.2f} MiB allocated" if allocated else ""
            print(f"{how}: {gradients / MIB:8.2f} MiB of gradients{memory}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
