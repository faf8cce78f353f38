"""--strategy deepspeed: ZeRO, with the config that lies beside this file."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

if not torch.accelerator.is_available():
    # Otherwise every rank warns, when DeepSpeed is imported, that it has found nothing better.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from torch import Tensor

import ppsf_dist.deepspeed
from model import ByteTransformer, next_byte_loss
from ppsf_dist.bootstrap import ProcessInfo
from strategies import MakeOptimizer, Trainer


class ZeroTrainer(Trainer):
    """A model in a DeepSpeed engine.

    Its checkpoints are those of the other strategies, so that a run can go on under any of them.
    """

    def __init__(self, engine: Any, ranks: ProcessInfo) -> None:
        super().__init__(engine.module, engine.basic_optimizer, ranks, forward=engine)
        self._engine = engine

    def train_on(self, windows: Tensor) -> Tensor:
        loss = next_byte_loss(self._engine, windows.to(self.device))
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach()

    def averaged(self) -> AbstractContextManager[object]:
        return self.handle.averaged(self._engine, self._engine.optimizer)

    def save(self, path: Path, step: int) -> None:
        ppsf_dist.deepspeed.save_checkpoint(path, self._engine, extra={"step": step})

    def load(self, path: Path) -> int:
        return int(ppsf_dist.deepspeed.load_checkpoint(path, self._engine)["step"])


def zero(model: ByteTransformer, make_optimizer: MakeOptimizer, ranks: ProcessInfo, stage: int) -> Trainer:
    """A model in an engine of that stage.

    The config's own optimizer entry gives way to the one of the command line, and its precision to --dtype.
    """
    config = json.loads((Path(__file__).parent / f"ds_config_zero{stage}.json").read_text())
    del config["optimizer"]
    dtype = next(model.parameters()).dtype
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    # DeepSpeed checks that the batch sizes agree with each other. The loop hands out the batches.
    config["train_micro_batch_size_per_gpu"] = 1
    # Only the launchers that DeepSpeed knows set it.
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    if ranks.device.type == "cpu":
        # Otherwise DeepSpeed compiles its shared-memory collectives for a minute, which needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls functions that torch 2.13 has renamed, and would be told so in every step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model.parameters()), config=config)
    return ZeroTrainer(engine, ranks)
