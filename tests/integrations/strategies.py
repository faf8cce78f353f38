"""Lightning's strategies on two ranks: ``python -m tests.integrations.strategies KIND TRIGGER FOLDER``.

A run of six steps, and one of four that is resumed to six. Rank 0 writes what came out.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.integrations.lightning import ScheduleFreeMixin
from tests.deepspeed.engines import deepspeed_on_cpu

TRIGGERS: dict[str, dict[str, Any]] = {
    "in training": {"every_n_train_steps": 2},
    "at validations": {"monitor": "val_loss", "mode": "min"},
}


class OnCpu(DeepSpeedStrategy):
    """Lightning allows DeepSpeed on CUDA alone; DeepSpeed itself runs on gloo."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def strategy(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy()
    if kind == "deepspeed":
        return OnCpu(stage=2, process_group_backend="gloo")
    return ModelParallelStrategy(save_distributed_checkpoint=kind == "shards")


class Model(ScheduleFreeMixin, LightningModule):
    def __init__(self, *, shards: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 2))
        self.shards, self.losses, self.averages = shards, list[float](), list[float]()

    def configure_model(self) -> None:
        if self.shards and not hasattr(self.net, "unshard"):
            fully_shard(self.net)

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = (self.net(batch[0]) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        loss = (self.net(batch[0]) - 1).square().mean()
        self.averages.append(loss.item())
        self.log("val_loss", loss)

    def configure_optimizers(self) -> Any:
        return ProdigyPlusScheduleFree(self.parameters(), d0=1e-2)


def fit(kind: str, trigger: str, folder: str, steps: int, path: str | None = None) -> tuple[Model, Trainer]:
    torch.manual_seed(0)
    # Lightning begins an epoch that is resumed with its first batch: all batches are the same one.
    batch = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(batch.repeat(12, 1)), 4)
    model = Model(shards=kind in ("shards", "one file"))
    checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **TRIGGERS[trigger])
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=2, strategy=strategy(kind), default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=2, num_sanity_val_steps=0,
        limit_val_batches=1, use_distributed_sampler=False, callbacks=[checkpoint],
    )  # fmt: skip
    trainer.fit(model, loader, loader, ckpt_path=path)
    return model, trainer


def main() -> None:
    warnings.simplefilter("ignore")
    kind, trigger, folder = sys.argv[1:]
    if kind == "deepspeed":
        deepspeed_on_cpu()
    whole, trainer = fit(kind, trigger, f"{folder}/whole", 6)
    found = {"losses": list(whole.losses), "averages": list(whole.averages)}
    if kind != "deepspeed":
        # A checkpoint by hand, after the run and an evaluation, leaves the average in the model.
        loader = DataLoader(TensorDataset(torch.randn(4, 40, generator=torch.Generator().manual_seed(1))), 4)
        trainer.validate(whole, loader, verbose=False)
        trainer.save_checkpoint(f"{folder}/by_hand")
        trainer.validate(whole, loader, verbose=False)
        found["after"] = whole.averages[-2:]
    fit(kind, trigger, f"{folder}/parts", 4)
    resumed, _ = fit(kind, trigger, f"{folder}/parts", 6, f"{folder}/parts/step=4.ckpt")
    found |= {"resumed": resumed.losses, "again": resumed.averages}
    # Of the checkpoint in the middle, what a person loads is the model.
    loaded = Model(shards=kind in ("shards", "one file"))
    tested = Trainer(
        accelerator="cpu", devices=2, strategy=strategy(kind), logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1, use_distributed_sampler=False,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.randn(4, 40, generator=torch.Generator().manual_seed(1))), 4)
    tested.validate(loaded, loader, ckpt_path=f"{folder}/whole/step=4.ckpt", verbose=False)
    found["saved"] = loaded.averages
    if trainer.global_rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
