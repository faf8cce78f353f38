"""Lightning 2: see ``docs/trainers/lightning.md``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppsf_dist.evaluation import averaged, innermost
from ppsf_dist.extras import missing
from ppsf_dist.integrations.modes import step_sizes, trains
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.sharding import drop_gathered_weights

TRAINING_WEIGHTS = "ppsf_dist_training_weights"
"""The key of a checkpoint under which y stands, where ``state_dict`` is x."""

try:
    from lightning.pytorch import LightningModule
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
    checkpoint from the middle of training holds y as well, under :data:`TRAINING_WEIGHTS`, unless it is
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
        """Bring the training weights back."""
        self._train()
        super().on_validation_model_train()

    def on_train_start(self) -> None:
        """A checkpoint that was saved in a validation holds the average: bring back what is kept beside it."""
        self._train()
        super().on_train_start()

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
        if not training:
            return
        y = {name: value.detach().clone() for name, value in checkpoint["state_dict"].items()}
        for optimizer in training:
            with averaged(optimizer, self):
                x = self.trainer.strategy.lightning_module_state_dict()
                checkpoint["state_dict"] = {name: value.detach().clone() for name, value in x.items()}
        if "optimizer_states" in checkpoint:
            checkpoint[TRAINING_WEIGHTS] = y

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Train on from y; everything else takes the average."""
        super().on_load_checkpoint(checkpoint)
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if fitting and TRAINING_WEIGHTS in checkpoint:
            checkpoint["state_dict"] = checkpoint[TRAINING_WEIGHTS]

    def _ours(self) -> list[DistributedOptimizer]:
        made = self.trainer.optimizers if self._trainer is not None else []
        found = [innermost(optimizer) for optimizer in made]
        return [optimizer for optimizer in found if isinstance(optimizer, DistributedOptimizer)]

    def _hold_average(self) -> None:
        for optimizer in self._ours():
            if trains(optimizer) and self.trainer.state.fn == "fit":
                optimizer.eval(keep=True)
                drop_gathered_weights(self)

    def _train(self) -> None:
        for optimizer in self._ours():
            if not optimizer.param_groups[0].get("train_mode", True):
                optimizer.train()
                drop_gathered_weights(self)
