"""A loop of one's own: FSDP2, a compiled model, autocast, activation checkpointing and accumulation, no learning rate.

torchrun --nproc-per-node 2 examples/plain_loop.py
"""

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from ppsf_dist import RECOMMENDED, Monitor, ProdigyPlusScheduleFree, averaged, init_process_group
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", type=Path, default=Path("runs/plain_loop"))
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--backend", default="inductor", help="of torch.compile")
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Predicts the next of 64 tokens; embedding and head are one tensor."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
model = Model().to(device)
for block in model.blocks:
    fully_shard(block)
    block.compile(backend=options.backend)
fully_shard(model)
optimizer = ProdigyPlusScheduleFree(model.parameters(), **RECOMMENDED)
options.output.mkdir(parents=True, exist_ok=True)


def loss_of(tokens: Tensor) -> Tensor:
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return nn.functional.cross_entropy(model(tokens).float(), (tokens * 5 + 7) % 64)


if options.resume:
    load_checkpoint(options.output / "checkpoint", model, optimizer)
torch.manual_seed(rank)
with Monitor(optimizer, every=10, to=options.output / "run.jsonl", model=model) as monitor:
    for _ in range(options.steps):
        for _ in range(2):  # micro batches
            loss = loss_of(torch.randint(0, 64, (16,), device=device)) / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.log(loss=2 * loss.detach())
    save_checkpoint(options.output / "checkpoint", model, optimizer)  # to go on with: the training weights
    with averaged(optimizer, model), torch.no_grad():  # what to evaluate and to keep
        loss = loss_of(torch.arange(64, device=device))
if rank == 0:
    print(f"d {optimizer.get_d_estimate():.4e}, loss of the averaged weights: {loss.item():.4f}")
dist.barrier()
dist.destroy_process_group()
time.sleep(0.1)  # after fully_shard gloo's threads go on, and one that still holds a tensor when Python ends aborts it
