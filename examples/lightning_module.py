"""Lightning with an optimizer that needs no learning rate: python examples/lightning_module.py"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from ppsf_dist import RECOMMENDED, ProdigyPlusScheduleFree
from ppsf_dist.integrations.lightning import ScheduleFreeMixin


class Classifier(ScheduleFreeMixin, LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch, _):
        inputs, classes = batch
        return nn.functional.cross_entropy(self.net(inputs), classes)

    def validation_step(self, batch, _):
        inputs, classes = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(inputs), classes), sync_dist=True)

    def configure_optimizers(self):
        return ProdigyPlusScheduleFree(self.parameters(), **RECOMMENDED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/lightning")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()

    torch.manual_seed(0)
    inputs = torch.randn(2048, 16)
    data = torch.utils.data.TensorDataset(inputs, (inputs @ torch.randn(16, 4)).argmax(1))
    train, validation = torch.utils.data.random_split(data, [1792, 256])
    trainer = Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        max_epochs=options.epochs,
        logger=CSVLogger(options.output),
        callbacks=[ModelCheckpoint(options.output, monitor="val_loss")],
        log_every_n_steps=10,
        enable_progress_bar=False,
    )
    model = Classifier()
    trainer.fit(
        model, torch.utils.data.DataLoader(train, 32, shuffle=True), torch.utils.data.DataLoader(validation, 256)
    )
    print(f"best: {trainer.checkpoint_callback.best_model_score:.4f} in {trainer.checkpoint_callback.best_model_path}")
