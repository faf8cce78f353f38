"""torchtitan's optimizers container, schedule and flat checkpoint without a learning rate, small enough for a CPU.

torchrun --nproc-per-node 2 examples/torchtitan_container.py
"""

import argparse
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

from ppsf_dist import averaged, init_process_group
from ppsf_dist.integrations.torchtitan import NoSchedule, ScheduleFreeOptimizers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="runs/torchtitan_container")
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

init_process_group()
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
fully_shard(model)

# In torchtitan: Trainer.Config(optimizer=ScheduleFreeOptimizers.Config(), lr_scheduler=NoSchedule.Config(), ...)
optimizers = ScheduleFreeOptimizers.Config().build(model_parts=[model])
schedulers = NoSchedule.Config().build(optimizers=optimizers, training_steps=options.steps)


def loss_of(tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens), (tokens * 5 + 7) % 64)


if options.resume:
    content = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    dcp.load(content, checkpoint_id=options.output)
    model.load_state_dict(content["model"])
    optimizers.load_state_dict(content["optimizer"])
for _ in range(options.steps):
    optimizers.zero_grad()
    loss_of(torch.randint(0, 64, (32,))).backward()
    optimizers.step()
    schedulers.step()
dcp.save({"model": model.state_dict(), "optimizer": optimizers.state_dict()}, checkpoint_id=options.output)

with averaged(optimizers, model), torch.no_grad():
    loss = loss_of(torch.arange(64)).item()
if dist.get_rank() == 0:
    print(f"d {schedulers.get_metrics()['d']:.4e}, loss of the averaged weights: {loss:.4f}")
dist.barrier()
dist.destroy_process_group()
time.sleep(0.1)  # after fully_shard gloo's threads go on, and one that still holds a tensor when Python ends aborts it
