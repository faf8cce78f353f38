"""What a person writes for Accelerate and for Hugging Face's Trainer: ``python -m tests.deepspeed.trainers KIND FILE``.

Rank 0 writes to a file what came out at each stage. Both keep a state of their process, so they have one of their own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from ppsf_dist.evaluation import innermost
from tests.deepspeed.engines import config, deepspeed_on_cpu

NO_DEEPSPEED = -1
STAGES = (0, 1, 2, 3)
NAMED_IN_CONFIG = 2
"""The stage at which the config names the optimizer."""
WIDTH = 40
STEPS = 4
# Trainer makes two groups, the config one.
ARGUMENTS: dict[str, Any] = {"d0": 1e-3, "split_groups": False}


class Regression(nn.Module):
    """Two layers and their squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predicted = self.outer(self.inner(inputs.to(self.inner.weight.dtype)).tanh()).float().squeeze(-1)
        return {"loss": (predicted - labels).square().mean(), "predicted": predicted}


def settings_for(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    settings = config(stage, dtype)
    # Otherwise Trainer writes no model at stage 3.
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if stage == NAMED_IN_CONFIG:
        settings["optimizer"] = {"type": "ProdigyPlusScheduleFree", "params": ARGUMENTS}
    return settings


def with_accelerate(stage: int) -> dict[str, Any]:
    """Losses on the weights y and x, reached through Accelerate's wrappers, on two ranks."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DummyOptim

    from ppsf_dist.integrations.accelerate import check_prepared

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings_for(stage, torch.bfloat16)))
    model = Regression()
    named = stage == NAMED_IN_CONFIG
    parameters = model.parameters()
    optimizer = DummyOptim(parameters) if named else ProdigyPlusScheduleFree(parameters, **ARGUMENTS)
    model, optimizer = accelerator.prepare(model, optimizer)
    check_prepared(model, optimizer)
    inputs, labels = torch.randn(16, WIDTH), torch.randn(16)
    share = slice(dist.get_rank(), None, dist.get_world_size())

    def train() -> None:
        for _ in range(STEPS):
            accelerator.backward(model(inputs[share], labels[share])["loss"])
            optimizer.step()
            optimizer.zero_grad()

    train()

    def loss() -> float:
        with torch.no_grad():
            return float(model(inputs, labels)["loss"])

    losses = {"y": loss()}
    optimizer.eval()
    losses["eval"] = loss()
    optimizer.train()
    losses["train"] = loss()
    with averaged(optimizer, model):
        losses["averaged"] = loss()
    losses["after"] = loss()
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        accelerator.save_state(shared[0])
        train()
        losses["more"] = loss()
        accelerator.load_state(shared[0])
        losses["loaded"] = loss()
        train()
        losses["resumed"] = loss()
        dist.barrier()
    return {"ranks": dist.get_world_size(), "wrapper": type(optimizer).__name__, **losses}


def with_trainer(stage: int) -> dict[str, Any]:
    """Losses of Hugging Face's evaluations between training steps, and of the training weights at the end."""
    from transformers import Trainer, TrainingArguments

    from ppsf_dist.integrations.transformers import attach

    data = [{"inputs": torch.randn(WIDTH), "labels": torch.randn(())} for _ in range(32)]

    def make(folder: str, steps: int) -> Trainer:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            eval_strategy="steps",
            eval_steps=STEPS,
            save_steps=STEPS,
            logging_steps=1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=1,
            use_cpu=stage == NO_DEEPSPEED,
            deepspeed=None if stage == NO_DEEPSPEED else settings_for(stage, torch.float32),
            learning_rate=1.0,
            report_to=[],
            disable_tqdm=True,
        )
        # Under DeepSpeed Trainer ignores what it gets as optimizers=, without a word.
        own: dict[str, Any] = {"optimizer_cls_and_kwargs": (ProdigyPlusScheduleFree, ARGUMENTS)}
        own = {} if stage == NAMED_IN_CONFIG else own
        trainer = Trainer(Regression(), arguments, train_dataset=data, eval_dataset=data[:16], **own)
        attach(trainer)
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = make(f"{folder}/whole", 2 * STEPS)
        trainer.train()
        history = trainer.state.log_history
        saved = Regression()
        saved.load_state_dict(load_file(f"{folder}/whole/checkpoint-{STEPS}/model.safetensors"))
        batch = {name: torch.stack([row[name] for row in data[:16]]) for name in data[0]}
        result: dict[str, Any] = {
            "wrapper": type(trainer.optimizer).__name__,
            "optimizer": type(innermost(trainer.optimizer)).__name__,
            "eval": [row["eval_loss"] for row in history if "eval_loss" in row],
            "d": [row["d"] for row in history if "loss" in row],
            "saved": saved(**batch)["loss"].item(),
        }
        cast(Any, trainer.optimizer).train()
        with torch.no_grad():
            result["y"] = trainer.model_wrapped(**batch)["loss"].item()
        make(f"{folder}/parts", STEPS).train()
        resumed = make(f"{folder}/parts", 2 * STEPS)
        resumed.train(resume_from_checkpoint=True)
        result["resumed"] = [row["eval_loss"] for row in resumed.state.log_history if "eval_loss" in row]
    return result


def with_optimizer_ignored(_: int) -> dict[str, Any]:
    """What Trainer says that is given an optimizer and a config that names another."""
    from transformers import Trainer, TrainingArguments

    from ppsf_dist.integrations.transformers import attach

    settings = config(1, torch.float32) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    data = [{"inputs": torch.randn(WIDTH), "labels": torch.randn(())} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=1, lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=1e-3,
            per_device_train_batch_size=1, deepspeed=settings, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        model = Regression()
        given = ProdigyPlusScheduleFree(model.parameters())
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(given, None))
        attach(trainer)
        try:
            trainer.train()
        except TypeError as error:
            return {"error": str(error)}
    return {"error": ""}


def main() -> None:
    kind, file = sys.argv[1], Path(sys.argv[2])
    deepspeed_on_cpu()
    from accelerate.state import AcceleratorState

    results = {}
    stages = {"accelerate": STAGES, "trainer": (NO_DEEPSPEED, *STAGES), "ignored": (1,)}[kind]
    for stage in stages:
        torch.manual_seed(0)
        run = {"accelerate": with_accelerate, "trainer": with_trainer, "ignored": with_optimizer_ignored}[kind]
        results[stage] = run(stage)
        # Otherwise the next one would have the config of this one.
        AcceleratorState._reset_state(reset_partial_state=True)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
