"""Hugging Face Trainer, and those made from it such as TRL's SFTTrainer: see ``docs/trainers/transformers.md``."""

from __future__ import annotations

from typing import Any

from ppsf_dist.evaluation import innermost
from ppsf_dist.extras import missing
from ppsf_dist.integrations.modes import step_sizes, trains
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.sharding import drop_gathered_weights

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import SchedulerType
except ModuleNotFoundError as error:
    raise missing(error, "transformers") from error

_OF_AN_OPTIMIZER = "optimizer_cls_and_kwargs=(ProdigyPlusScheduleFree, {}) of Trainer"


def attach(trainer: Trainer, *, schedule: bool = False, clip: bool = False) -> None:
    """Make a Trainer evaluate and save the averaged weights, log d, and resume exactly.

    Every model that it saves or evaluates, whatever the strategies, is the average x; the training weights y come back
    bit for bit before the next step. They are in the optimizer's file of a checkpoint, so that a run that is resumed
    goes on as if it had not stopped. After ``train()`` the model is the average.

    Call it after the Trainer is made and after its other callbacks are added, before ``train()``.

    Args:
        trainer: with an optimizer of this package, by ``optimizer_cls_and_kwargs=``, ``optimizers=`` or DeepSpeed's
            config. One without an average is logged and checked all the same.
        schedule: allow another schedule than a constant one, for instance for an optimizer without an average.
        clip: allow ``max_grad_norm``.

    Raises:
        ValueError: ``lr_scheduler_type`` or ``max_grad_norm`` is not allowed; the message says what to write.
        TypeError: at ``train()``, the optimizer that trains is none of this package, which happens in silence where
            Trainer ignores ``optimizers=`` under DeepSpeed.
        RuntimeError: another callback asks for a save after this one has looked: attach last.
    """
    args = trainer.args
    if not schedule and args.lr_scheduler_type not in (SchedulerType.CONSTANT, "constant"):
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(
            f'lr_scheduler_type="{kind}" of TrainingArguments multiplies the step size that the optimizer finds: write '
            'lr_scheduler_type="constant", or attach(trainer, schedule=True) if you mean it'
        )
    if not clip and args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} of TrainingArguments (1.0 is its default) clips the gradients that d "
            "is found from: write max_grad_norm=0, or attach(trainer, clip=True) if you mean it"
        )
    handler = trainer.callback_handler
    if any(isinstance(callback, AverageCallback) for callback in handler.callbacks):
        return
    # What writes logs must come after the one that adds to them, and what decides to save before the one that swaps.
    handler.callbacks.insert(0, StepSizeCallback())
    trainer.add_callback(AverageCallback())


class StepSizeCallback(TrainerCallback):
    """Adds d to the logs. It must come before the callbacks that write them: ``attach`` sees to that."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the step sizes to the logs of a training step."""
        logs, optimizer = kwargs.get("logs"), innermost(kwargs.get("optimizer"))
        if logs is not None and "loss" in logs and isinstance(optimizer, DistributedOptimizer):
            sizes = step_sizes(optimizer)
            logs |= sizes
            # The history has had a copy of them already.
            state.log_history[-1] |= sizes


class AverageCallback(TrainerCallback):
    """Swaps to the average before Trainer evaluates or saves. It must come last: ``attach`` sees to that."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse an optimizer that is none of this package."""
        optimizer = innermost(kwargs.get("optimizer"))
        if not isinstance(optimizer, DistributedOptimizer):
            where = (
                "Trainer ignores optimizers= and optimizer_cls_and_kwargs= where DeepSpeed's config names an "
                "optimizer: name one of ppsf_dist there (import ppsf_dist.deepspeed first)"
                if args.deepspeed
                else f"give it one by {_OF_AN_OPTIMIZER}"
            )
            raise TypeError(f"the optimizer that trains is a {type(optimizer).__name__}, none of ppsf_dist: {where}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the average into the model where it is about to be evaluated or saved, or where training is over."""
        if control.should_evaluate or control.should_save or control.should_training_stop:
            _hold_average(kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same at the end of an epoch."""
        self.on_step_end(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a checkpoint that was written with the training weights."""
        if trains(innermost(kwargs.get("optimizer"))):
            raise RuntimeError(
                f"checkpoint-{state.global_step} holds the training weights y, not the average: another callback asked "
                "for this save after ppsf_dist's had looked; call attach(trainer) after the other callbacks are added"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the average in the model: what is saved or evaluated from now on is that."""
        _hold_average(kwargs)


def _hold_average(kwargs: dict[str, Any]) -> None:
    optimizer = innermost(kwargs.get("optimizer"))
    if isinstance(optimizer, DistributedOptimizer) and trains(optimizer):
        # Trainer itself calls train() before the next step, which brings back what is kept.
        optimizer.eval(keep=True)
        drop_gathered_weights(kwargs.get("model"))
