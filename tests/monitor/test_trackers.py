"""Rows in the real W&B (offline) and the real MLflow (files); TensorBoard's are in test_monitor.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import wandb
from torch import nn

from ppsf_dist import Monitor, ProdigyPlusScheduleFree


def watched(to: Any) -> list[dict[str, Any]]:
    model = nn.Linear(4, 4)
    optimizer = ProdigyPlusScheduleFree(model.parameters())
    with Monitor(optimizer, every=2, to=to) as monitor:
        for step in range(6):
            model(torch.randn(8, 4)).square().mean().backward()
            monitor.log(loss=float(step))
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
    return monitor.rows


def test_rows_stand_in_a_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = wandb.init(mode="offline", project="test", dir=tmp_path, settings=wandb.Settings(silent=True))
    rows = watched(run)
    run.log({})
    summary = dict(run.summary)
    run.finish()
    assert summary["_step"] == 6 and summary["ppsf/loss"] == 5.0
    assert summary["ppsf/d"] == rows[-1]["groups"][0]["d"]


def test_rows_stand_in_a_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its store of files wants to be asked for; a database would need another package.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("test")
    with mlflow.start_run() as run:
        rows = watched(mlflow)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "ppsf/d")
    assert [(one.step, one.value) for one in history] == [(row["step"], row["groups"][0]["d"]) for row in rows]
    assert [row["step"] for row in rows] == [2, 4, 6]
