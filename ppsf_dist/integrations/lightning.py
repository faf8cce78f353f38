"""Lightning 2: see ``docs/trainers/lightning.md``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from ppsf_dist.evaluation import averaged, innermost
from ppsf_dist.extras import missing
from ppsf_dist.integrations.modes import step_sizes, trains
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.sharding import drop_gathered_weights

TRAINING_WEIGHTS = "ppsf_dist_training_weights"
"""The key of a checkpoint under which y stands, where ``state_dict`` is x."""

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
except ModuleNotFoundError as error:
    raise missing(error, "lightning") from error

if TYPE_CHECKING:
    # Lightning's own hooks are called through super(); at run time a mixin stands before the module.
    _Base = LightningModule
else:
    _Base = object


class ScheduleFreeMixin(_Base):
    """Makes a LightningModule validate, test, predict and save with the averaged weights, log d, and resume exactly.

    ``class Model(ScheduleFreeMixin, LightningModule)``, the mixin first. It is no callback because ModelCheckpoint
    saves before callbacks that come after it are asked, and those before it bring training back too early.

    Whatever triggers a checkpoint, its ``state_dict`` is the average x, and training goes on from y bit for bit. A
    checkpoint from the middle of training holds y as well, under ``TRAINING_WEIGHTS`` (beside the states of the
    optimizers where a ModelParallelStrategy writes shards, in the optimizer's under DeepSpeed), unless it is
    ``save_weights_only``. After ``fit()`` the model is the average.

    Hooks of your own by the names of those here must call ``super()``.
    """

    def on_validation_model_eval(self) -> None:
        """Hold the average while Lightning validates."""
        self._hold_average()
        super().on_validation_model_eval()

    def on_test_model_eval(self) -> None:
        """The same for a test."""
        self._hold_average()
        super().on_test_model_eval()

    def on_predict_model_eval(self) -> None:
        """The same for predictions."""
        self._hold_average()
        super().on_predict_model_eval()

    def on_validation_model_train(self) -> None:
        """Bring the training weights back, where training goes on."""
        if self.trainer.state.fn == "fit":
            self._train()
        super().on_validation_model_train()

    def on_train_start(self) -> None:
        """A checkpoint that was saved in a validation holds the average: bring back what is kept beside it."""
        self._train()
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Bring the training weights back, where DeepSpeed has saved the average."""
        self._train()
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_end(self) -> None:
        """Leave the average in the model."""
        super().on_train_end()
        self._hold_average()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step sizes, where there is a logger."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        for optimizer in self._ours():
            self.log_dict(step_sizes(optimizer))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the average where the weights stand in a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        training = [optimizer for optimizer in self._ours() if trains(optimizer)]
        strategy = self.trainer.strategy
        if not training:
            if isinstance(strategy, ModelParallelStrategy) and "optimizer_states" in checkpoint:
                # In a validation. What loads shards loads only what an optimizer has already, and y is not among it.
                self._train()
                made = self.trainer.optimizers
                checkpoint["optimizer_states"] = [strategy.optimizer_state(optimizer) for optimizer in made]
                self._keep(_copy(strategy.lightning_module_state_dict()), checkpoint)
                self._average()
            return
        if isinstance(strategy, DeepSpeedStrategy):
            # It writes what is in its engine when this is over.
            self._average()
            return
        y = _copy(checkpoint["state_dict"])
        for optimizer in training:
            with averaged(optimizer, self):
                checkpoint["state_dict"] = _copy(strategy.lightning_module_state_dict())
        if "optimizer_states" in checkpoint:
            self._keep(y, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Train on from y; everything else takes the average."""
        super().on_load_checkpoint(checkpoint)
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if fitting and isinstance(self.trainer.strategy, ModelParallelStrategy):
            # It has loaded x already.
            _load_training_weights(self, checkpoint)
        elif fitting and TRAINING_WEIGHTS in checkpoint:
            checkpoint["state_dict"] = checkpoint[TRAINING_WEIGHTS]

    def _keep(self, y: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Put y where the strategy writes it: shards stand beside the states of the optimizers."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            checkpoint["optimizer_states"].append({TRAINING_WEIGHTS: y})
        else:
            checkpoint[TRAINING_WEIGHTS] = y

    def _ours(self) -> list[DistributedOptimizer]:
        made = self.trainer.optimizers if self._trainer is not None else []
        found = [innermost(optimizer) for optimizer in made]
        return [optimizer for optimizer in found if isinstance(optimizer, DistributedOptimizer)]

    def _hold_average(self) -> None:
        if self.trainer.state.fn == "fit":
            self._average()

    def _average(self) -> None:
        for optimizer in self._ours():
            if trains(optimizer):
                optimizer.eval(keep=True)
                drop_gathered_weights(self)

    def _train(self) -> None:
        for optimizer in self._ours():
            if not optimizer.param_groups[0].get("train_mode", True):
                optimizer.train()
                drop_gathered_weights(self)


def _copy(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in weights.items()}


def _load_training_weights(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Put y of a checkpoint into a module under ModelParallelStrategy, if it holds y."""
    y, full = checkpoint.get(TRAINING_WEIGHTS), True
    path = Path(module.trainer.strategy.broadcast(str(module.trainer.ckpt_path)))
    if y is None and path.is_dir():
        where = f"optimizer_{len(module.trainer.optimizers)}.{TRAINING_WEIGHTS}"
        kept = FileSystemReader(path).read_metadata().state_dict_metadata
        if any(name.startswith(where) for name in kept):
            content = {where: get_model_state_dict(module)}
            load(content, checkpoint_id=path)
            y, full = content[where], False
    if y is not None:
        set_model_state_dict(module, y, options=StateDictOptions(full_state_dict=full))
