"""A loop of one's own with Accelerate and no learning rate: accelerate launch examples/accelerate_loop.py"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppsf_dist import RECOMMENDED, ProdigyPlusScheduleFree, averaged
from ppsf_dist.integrations.accelerate import check_prepared, step_sizes

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="runs/accelerate_loop")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

torch.manual_seed(0)
points = torch.rand(2048, 8) * 4 - 2
data = TensorDataset(points, points.sin().sum(dim=1, keepdim=True))
loader = DataLoader(data, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
optimizer = ProdigyPlusScheduleFree(model.parameters(), **RECOMMENDED)

accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with="tensorboard", project_dir=options.output)
accelerator.init_trackers("logs")
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
check_prepared(model, optimizer, loader)
if options.resume:
    accelerator.load_state(f"{options.output}/state")

for epoch in range(options.epochs):
    for inputs, targets in loader:
        loss = (model(inputs) - targets).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.log({"loss": loss.item(), **step_sizes(optimizer.optimizer)}, step=epoch)
accelerator.save_state(f"{options.output}/state")  # to go on with: the training weights

with averaged(optimizer, model), torch.no_grad():  # to keep: the average
    loss = (accelerator.unwrap_model(model)(points) - data.tensors[1]).square().mean()
    accelerator.save_model(model, f"{options.output}/model")
accelerator.print(f"loss of the averaged weights: {loss.item():.4f}")
accelerator.wait_for_everyone()  # gloo's threads that still hold tensors when Python ends abort it
accelerator.end_training()
