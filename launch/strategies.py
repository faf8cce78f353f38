"""How a model lies on the ranks: one function for each value of --strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from model import ByteTransformer, next_byte_loss
from optimizers import Handle
from ppsf_dist.bootstrap import ProcessInfo
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ZERO_STAGES = (1, 2, 3)

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class UsageError(ValueError):
    """The options ask for something that cannot be run; the message, the same on every rank, says what can."""


class Trainer:
    """A model on its ranks, with its optimizer: what the training loop needs of a strategy.

    Args:
        module: owner of the parameters, for evaluation and checkpoints.
        optimizer: over the parameters of `module`.
        ranks: this process among the others.
        forward: what a training batch goes through, where it is not `module` itself.
        data_rank: which slice of a global batch this process takes, where it is not that of its rank.
        data_ranks: how many slices there are, where they are not as many as ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        ranks: ProcessInfo,
        forward: nn.Module | None = None,
        data_rank: int | None = None,
        data_ranks: int | None = None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.handle = Handle(optimizer)
        self.device = ranks.device
        self.data_rank = ranks.rank if data_rank is None else data_rank
        self.data_ranks = ranks.world_size if data_ranks is None else data_ranks
        self._forward = module if forward is None else forward

    def train_on(self, windows: Tensor) -> Tensor:
        """Takes one step on this rank's windows of the global batch and returns their mean loss before it."""

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = next_byte_loss(self._forward, windows.to(self.device))
            loss.backward()
            return loss

        if self.handle.needs_closure:
            loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            loss = closure()
            self.optimizer.step()
        return torch.as_tensor(loss).detach()

    def loss_of(self, windows: Tensor) -> Tensor:
        """Returns the mean loss of this rank's windows, without a gradient."""
        with torch.no_grad():
            return next_byte_loss(self.module, windows.to(self.device))

    def averaged(self) -> AbstractContextManager[object]:
        """Holds the weights to evaluate with, the averaged ones where there are such, inside `with`."""
        return self.handle.averaged(self.module)

    def save(self, path: Path, step: int) -> None:
        save_checkpoint(path, self.module, self.optimizer, extra={"step": step})

    def load(self, path: Path) -> int:
        """Loads model and optimizer and returns the step after which they were saved."""
        return int(load_checkpoint(path, self.module, self.optimizer)["step"])


def single(model: ByteTransformer, make_optimizer: MakeOptimizer, ranks: ProcessInfo) -> Trainer:
    """The whole model in one process.

    Raises:
        UsageError: there is more than one rank.
    """
    if ranks.world_size > 1:
        raise UsageError(
            f"--strategy single is for one process and there are {ranks.world_size} ranks: "
            "choose --strategy fsdp or ddp, or start without a launcher"
        )
    model.to(ranks.device)
    return Trainer(model, make_optimizer(model.parameters()), ranks)


def ddp(model: ByteTransformer, make_optimizer: MakeOptimizer, ranks: ProcessInfo) -> Trainer:
    """The whole model on every rank, gradients averaged."""
    model.to(ranks.device)
    return Trainer(model, make_optimizer(model.parameters()), ranks, forward=DistributedDataParallel(model))


def fsdp(model: ByteTransformer, make_optimizer: MakeOptimizer, ranks: ProcessInfo) -> Trainer:
    """FSDP2: the rows of every parameter split over the ranks, gathered block by block."""
    model.to(ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return Trainer(model, make_optimizer(model.parameters()), ranks)


def deepspeed(model: ByteTransformer, make_optimizer: MakeOptimizer, ranks: ProcessInfo, zero_stage: int) -> Trainer:
    """ZeRO: optimizer state (stage 1), gradients too (2) and parameters too (3) split over the ranks.

    Raises:
        UsageError: DeepSpeed is not installed.
    """
    try:
        from zero import zero
    except ModuleNotFoundError as error:
        raise UsageError(f"--strategy deepspeed: {error}: pip install -e .[deepspeed]") from error
    return zero(model, make_optimizer, ranks, zero_stage)


STRATEGIES: dict[str, Callable[..., Trainer]] = {
    "single": single,
    "ddp": ddp,
    "fsdp": fsdp,
    "deepspeed": deepspeed,
}
