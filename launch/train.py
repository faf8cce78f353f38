"""Trains a byte-level language model on the source of Python's standard library. See --help."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import ppsf_dist
from corpus import standard_library
from forecast import table
from loop import Run
from model import ByteTransformer
from optimizers import make, schedule_of
from options import LAST, Settings, parse
from ppsf_dist.bootstrap import ProcessInfo
from ppsf_dist.fsdp import remove_checkpoint
from ppsf_dist.optimizers.base import DistributedOptimizer
from records import RunFolder, run_of_checkpoint
from strategies import DTYPES, STRATEGIES, Trainer, UsageError

# Shells report a process that a signal ended as this much plus the number of the signal.
EXIT_BY_SIGNAL = 128
WRONG_USAGE = 2

LETTING_GO = 0.1
"""Seconds."""


def main() -> int:
    """Runs one training and returns the exit code."""
    settings = parse()
    if settings.dry_run:
        return _dry_run(settings)
    ranks = ppsf_dist.init_process_group()
    try:
        received = run(settings, ranks)
        code = EXIT_BY_SIGNAL + received if received else 0
    except UsageError as error:
        code = WRONG_USAGE
        if ranks.rank == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
    dist.destroy_process_group()
    # torch's caches of DTensors keep the group, and with it gloo's threads. One that still holds a tensor when Python
    # ends aborts it: they get the time to let go.
    time.sleep(LETTING_GO)
    return code


def _dry_run(settings: Settings) -> int:
    try:
        with torch.device("meta"):
            model = _model(settings)
        optimizer = _optimizer(settings, model.parameters())
        assert isinstance(optimizer, DistributedOptimizer), "options.py refuses the others"
        print(table(settings, optimizer))
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return WRONG_USAGE
    return 0


def run(settings: Settings, ranks: ProcessInfo) -> int:
    """Run one training on ranks that have met, and return the signal that ended it early, or 0.

    Raises:
        UsageError: the settings ask for what cannot be run.
    """
    strategy = settings.strategy or ("single" if ranks.world_size == 1 else "fsdp")
    folder = RunFolder(settings.output)
    _check_folder(settings, folder)
    torch.manual_seed(settings.seed)
    model = _model(settings)
    # Counted while the model is whole.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainer = _place(settings, strategy, ranks, model)
    first = _resume(settings, folder, trainer)
    corpus = standard_library()
    # Every rank has looked at the folder before rank 0 writes to it.
    dist.barrier()
    if ranks.rank == 0:
        if not first:
            if settings.overwrite:
                remove_checkpoint(folder.checkpoint)
            folder.clear()
        description = {
            "settings": settings.fixed(),
            "steps": settings.steps,
            "strategy": strategy,
            "optimizer": settings.optimizer,
            "schedule": schedule_of(settings),
            "averages": trainer.handle.averages,
            "ranks": ranks.world_size,
            "device": ranks.device.type,
            "parameters": parameters,
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
            "corpus_sha256": corpus.sha256,
            "unigram_entropy": corpus.unigram_entropy,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        folder.begin(description, after_step=first)
    return Run(settings, ranks, trainer, corpus, folder).train(first)


def _check_folder(settings: Settings, folder: RunFolder) -> None:
    """Refuses to overwrite a run unasked, and to resume one with settings that are not its own."""
    if settings.resume is None:
        if folder.holds_a_run() and not settings.overwrite:
            raise UsageError(
                f"--output {folder.path} holds a run already: --resume goes on with it, --overwrite removes it, "
                "another --output keeps it"
            )
        return
    earlier = run_of_checkpoint(_checkpoint(settings, folder)).description().get("settings", {})
    assert isinstance(earlier, dict)
    changed = [
        f"{name} was {earlier[name]} and is now {value}"
        for name, value in settings.fixed().items()
        if name in earlier and earlier[name] != value
    ]
    if changed:
        raise UsageError(f"--resume: {'; '.join(changed)}. Give the options that the run began with")


def _checkpoint(settings: Settings, folder: RunFolder) -> Path:
    return folder.checkpoint if settings.resume in (None, LAST) else Path(settings.resume)


def _resume(settings: Settings, folder: RunFolder, trainer: Trainer) -> int:
    """Loads the checkpoint that the settings ask for and returns its step, 0 for none."""
    if settings.resume is None:
        return 0
    checkpoint = _checkpoint(settings, folder)
    try:
        first = trainer.load(checkpoint)
    except FileNotFoundError as error:
        if settings.resume == LAST:
            # A launcher that starts a failed job again gives --resume the first time too.
            return 0
        raise UsageError(f"--resume: {error}") from error
    if first >= settings.steps:
        raise UsageError(f"{checkpoint} is at step {first}, so --steps {settings.steps} leaves nothing: raise it")
    return first


def _place(settings: Settings, strategy: str, ranks: ProcessInfo, model: ByteTransformer) -> Trainer:
    def make_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return _optimizer(settings, parameters)

    choice = {"zero_stage": settings.zero_stage} if strategy == "deepspeed" else {}
    trainer = STRATEGIES[strategy](model, make_optimizer, ranks, **choice)
    if settings.batch_size % trainer.data_ranks:
        raise UsageError(
            f"--batch-size {settings.batch_size} does not divide over {trainer.data_ranks} ranks: "
            f"it counts the windows of all of them together, so give a multiple of {trainer.data_ranks}"
        )
    return trainer


def _model(settings: Settings) -> ByteTransformer:
    model = ByteTransformer(settings.dim, settings.layers, settings.heads, settings.seq_len)
    return model.to(DTYPES[settings.dtype])


def _optimizer(settings: Settings, parameters: Iterable[nn.Parameter]) -> Optimizer:
    try:
        return make(settings, parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {settings.optimizer}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
