"""Lightning, the real one: it validates and saves the average, logs d, and resumes exactly."""

from __future__ import annotations

import csv
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.integrations.lightning import TRAINING_WEIGHTS, ScheduleFreeMixin
from tests.bootstrap.launchers import ROOT

EXAMPLE = ROOT / "examples" / "lightning_module.py"
STEPS = 6
TRIGGERS: dict[str, dict[str, Any]] = {
    "in training": {"every_n_train_steps": 2},
    "in training, weights alone": {"every_n_train_steps": 2, "save_weights_only": True},
    "at validations": {"monitor": "val_loss", "mode": "min"},
    "at ends of epochs": {"save_on_train_epoch_end": True, "every_n_epochs": 1},
}


class Model(ScheduleFreeMixin, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 40)
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = (self.net(batch[0]) - 1).square().mean()
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.validated.append(self.net.weight.detach().clone())
        self.log("val_loss", (self.net(batch[0]) - 1).square().mean())

    def configure_optimizers(self) -> Any:
        return ProdigyPlusScheduleFree(self.parameters(), d0=1e-2)


class Watch(Callback):
    """What is trained on and its average after each step, from the optimizer's state."""

    def __init__(self) -> None:
        self.y: list[Tensor] = []
        self.x: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        weight = pl_module.net.weight
        y, z = weight.detach().clone(), optimizer.state[weight]["z"].view_as(weight)
        self.y.append(y)
        self.x.append(y + (1 - 1 / 0.9) * (z - y))


def fit(folder: Path, *callbacks: Any, path: str | None = None, **arguments: Any) -> tuple[Model, Watch, Trainer]:
    torch.manual_seed(0)
    # Lightning begins an epoch that is resumed with its first batch: all batches are the same one.
    loader = DataLoader(TensorDataset(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).repeat(6, 1)), 4)
    model, watch = Model(), Watch()
    given: dict[str, Any] = {
        "max_steps": STEPS, "accelerator": "cpu", "devices": 1, "default_root_dir": str(folder), "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "val_check_interval": 3, "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
    }  # fmt: skip
    if not any(isinstance(one, ModelCheckpoint) for one in callbacks):
        given["enable_checkpointing"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(**given | arguments, callbacks=[watch, *callbacks])
        trainer.fit(model, loader, loader, ckpt_path=path)
    return model, watch, trainer


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_every_checkpoint_holds_the_average(trigger: str, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **TRIGGERS[trigger])
    _, watch, _ = fit(tmp_path, saves)
    found = sorted(tmp_path.glob("*.ckpt"))
    assert found
    for path in found:
        content = torch.load(path, weights_only=False)
        expected = watch.x[content["global_step"] - 1]
        torch.testing.assert_close(content["state_dict"]["net.weight"], expected, rtol=1e-5, atol=1e-6)
        if "weights alone" in trigger:
            assert TRAINING_WEIGHTS not in content and "optimizer_states" not in content


def test_validation_sees_the_average_and_training_goes_on_from_y(tmp_path: Path) -> None:
    model, watch, _ = fit(tmp_path / "validated")
    for weights, step in zip(model.validated, (3, 6), strict=True):
        torch.testing.assert_close(weights, watch.x[step - 1], rtol=1e-5, atol=1e-6)
    _, never, _ = fit(tmp_path / "never", limit_val_batches=0)
    for y, other in zip(watch.y, never.y, strict=True):
        assert torch.equal(y, other)
    torch.testing.assert_close(model.net.weight.detach(), watch.x[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trigger", ["in training", "at validations"])
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(trigger: str, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **TRIGGERS[trigger])
    _, whole, _ = fit(tmp_path, saves)
    path = min(tmp_path.glob("*.ckpt"), key=lambda one: int(one.stem.partition("=")[2]))
    step = int(path.stem.partition("=")[2])
    _, resumed, trainer = fit(tmp_path, path=str(path))
    assert trainer.global_step == STEPS and len(resumed.y) == STEPS - step
    for y, other in zip(whole.y[step:], resumed.y, strict=True):
        assert torch.equal(y, other)


def test_a_checkpoint_loaded_to_predict_with_is_the_average(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **TRIGGERS["in training"])
    _, watch, trainer = fit(tmp_path, saves)
    model = Model.load_from_checkpoint(tmp_path / "step=4.ckpt")
    torch.testing.assert_close(model.net.weight.detach(), watch.x[3], rtol=1e-5, atol=1e-6)
    loader = DataLoader(TensorDataset(torch.randn(4, 4)), 4)
    tested = Model()
    trainer.validate(tested, loader, ckpt_path=str(tmp_path / "step=4.ckpt"), verbose=False)
    torch.testing.assert_close(tested.validated[0], watch.x[3], rtol=1e-5, atol=1e-6)


def test_d_stands_in_the_log(tmp_path: Path) -> None:
    _, _, trainer = fit(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        logged = [float(row["d"]) for row in csv.DictReader(file) if row["d"]]
    assert len(logged) == STEPS and logged[-1] == pytest.approx(trainer.optimizers[0].get_d_estimate())  # type: ignore[attr-defined]


@pytest.mark.launch
def test_the_example_runs_on_one_rank_and_on_two(tmp_path: Path) -> None:
    """On two ranks through DDP; both print the validation loss of the best average, below that of guessing."""
    for devices in ("1", "2"):
        words = [str(EXAMPLE), "--output", str(tmp_path / devices), "--devices", devices, "--epochs", "3"]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        score = float(done.stdout.rpartition("best: ")[2].split()[0])
        assert score < 1.0, done.stdout
