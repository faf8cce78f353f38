"""The training loop."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from corpus import Corpus
from interrupt import StopRequest, first_received
from options import Settings, resume_command
from plot import draw
from ppsf_dist import check_replicas
from ppsf_dist.bootstrap import ProcessInfo
from records import Number, RunFolder
from strategies import Trainer

# Text that one validation looks at, the same at every validation and, up to whole batches, for every batch size.
VALIDATION_BYTES = 1 << 16
# Small training batches are put together to this size: validation keeps nothing for a backward pass.
VALIDATION_BATCH_BYTES = 1 << 12
BAR_SECONDS_IN_A_FILE = 10.0


@dataclass(frozen=True)
class Run:
    """Everything that one training needs, the same on every rank but for `ranks`."""

    settings: Settings
    ranks: ProcessInfo
    trainer: Trainer
    corpus: Corpus
    folder: RunFolder

    def train(self, first: int) -> int:
        """Takes the steps after `first`, saves, and returns the signal that ended them early, or 0.

        Every rank stops after the same step. Rank 0 writes the metrics, and at the end the picture and a summary.
        """
        with StopRequest() as stop:
            row, received = self._steps(first, stop)
            skipped = self.trainer.handle.skipped_steps
            if self.ranks.rank == 0:
                if skipped:
                    print(f"skipped steps      {skipped}: a gradient was not finite, so weights and d were left alone")
                if received:
                    self._say_how_to_resume(row, received)
                else:
                    draw([self.folder], self.folder.picture)
                    self._summarise(row)
            # A launcher that sees one rank end by a signal kills the others: let rank 0 say its last words first.
            dist.barrier()
        return received

    def _steps(self, first: int, stop: StopRequest) -> tuple[dict[str, Number], int]:
        settings, lead = self.settings, self.ranks.rank == 0
        row: dict[str, Number] = {}
        received = 0
        self.trainer.handle.train()
        self.trainer.module.train()
        bar = tqdm(
            total=settings.steps,
            initial=first,
            unit="step",
            disable=not lead,
            mininterval=0.1 if sys.stderr.isatty() else BAR_SECONDS_IN_A_FILE,
        )
        with bar:
            for step in range(first + 1, settings.steps + 1):
                row, received = self._step(step, stop)
                if settings.check_every and step % settings.check_every == 0:
                    check_replicas(self.trainer.optimizer)
                last = bool(received) or step == settings.steps
                if not received and (last or step % settings.eval_every == 0):
                    row["val_loss"] = self._validation_loss()
                if lead:
                    self.folder.append(row)
                    bar.set_postfix_str(_progress(row), refresh=False)
                    bar.update()
                if last or (settings.save_every and step % settings.save_every == 0):
                    self.trainer.save(self.folder.checkpoint, step)
                if last:
                    break
        return row, received

    def _step(self, step: int, stop: StopRequest) -> tuple[dict[str, Number], int]:
        """Takes one step; returns its line of metrics.jsonl and the signal received, both the same on every rank."""
        settings, handle = self.settings, self.trainer.handle
        handle.schedule(settings, step)
        began = time.perf_counter()
        windows = self.corpus.batch(settings.seed, step, settings.batch_size, settings.seq_len + 1)
        loss, received = self._agree(self.trainer.train_on(self._share(windows)), stop)
        row: dict[str, Number] = {
            "step": step,
            "loss": loss,
            **handle.numbers(),
            "tokens_per_second": settings.batch_size * settings.seq_len / (time.perf_counter() - began),
        }
        return row, received

    def _agree(self, own_loss: Tensor, stop: StopRequest) -> tuple[float, int]:
        """Returns the loss of the global batch, and the signal that any rank has received.

        The progress bar needs the loss of all ranks anyway; the signal travels with it, because ranks that stopped at
        different steps would wait for each other for ever.
        """
        numbers = torch.tensor([0.0, *stop.counts()], device=own_loss.device)
        numbers[0] = own_loss
        dist.all_reduce(numbers)
        total, *counts = numbers.tolist()
        return total / self.ranks.world_size, first_received(counts)

    def _validation_loss(self) -> float:
        """Returns the loss of the averaged weights on the validation windows, the same on every rank."""
        settings, trainer = self.settings, self.trainer
        batch = settings.batch_size * max(1, VALIDATION_BATCH_BYTES // (settings.batch_size * settings.seq_len))
        batches = max(1, VALIDATION_BYTES // (batch * settings.seq_len))
        windows = self.corpus.validation_windows(batches * batch, settings.seq_len + 1)
        trainer.module.eval()
        with trainer.averaged():
            losses = [trainer.loss_of(self._share(some)) for some in windows.chunk(batches)]
        trainer.module.train()
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        return float(mean) / self.ranks.world_size

    def _share(self, windows: Tensor) -> Tensor:
        return windows.chunk(self.trainer.data_ranks)[self.trainer.data_rank]

    def _say_how_to_resume(self, row: dict[str, Number], received: int) -> None:
        print(f"{signal.Signals(received).name}: saved step {row['step']} in {self.folder.checkpoint}. To go on:")
        print(f"  {resume_command(self.settings, self.ranks)}", flush=True)

    def _summarise(self, row: dict[str, Number]) -> None:
        print(f"training loss      {row['loss']:.4f} nats per byte, last batch")
        weights = "averaged weights" if self.trainer.handle.averages else "weights of the last step"
        print(f"validation loss    {row['val_loss']:.4f} nats per byte, {weights}")
        print(f"unigram entropy    {self.corpus.unigram_entropy:.4f} nats per byte")
        if "d" in row:
            print(f"d                  {row['d']:.3e}")
        print(f"checkpoint         {self.folder.checkpoint}")
        print(f"picture            {self.folder.picture}")


def _progress(row: dict[str, Number]) -> str:
    size = f"d {row['d']:.2e}" if "d" in row else f"lr {row['lr']:.2e}"
    return f"loss {row['loss']:.3f}, {size}, {row['tokens_per_second']:,.0f} tok/s"
