"""What a training script does on one rank in one section of a schedule, and how it is killed."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.harness.layouts import LAYOUTS, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights
from tests.runs import make_optimizer
from tests.switches import EVERY
from tests.thorough.cases import local
from tests.thorough.schedules import Operation, Schedule, Section

PROMISED, ATTEMPTED = "promised", "attempted"
"""Files that say which operation the last finished save, and the last save that began, would go on with."""

MORE = 1.25
"""How much longer a save takes over an older checkpoint, which it removes, than the first one."""

NOT_OURS = ("params", "differentiable")
"""Keys of a group; the second one torch adds to groups that are made after a checkpoint was loaded."""

CALLS = frozenset(
    {"open", "write", "flush", "fsync", "close", "replace", "rename", "mkdir", "rmdir", "unlink", "remove", "truncate"}
)
"""C functions before which a save can be killed."""


@dataclass
class Outcome:
    """What a section leaves: numbers after each operation, and whole tensors after the last one."""

    first: int
    d: dict[int, list[float]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def run_sections(todo: Sequence[tuple[Schedule, int, Path]]) -> None:
    """Run sections, given by their numbers. The last may end in the death of all ranks, so outcomes go to files."""
    for schedule, number, folder in todo:
        if _rank() == 0:
            folder.mkdir(exist_ok=True)
            started(folder, number).touch()
        outcome = resumed(schedule, schedule.sections[number], folder).run()
        if _rank() == 0:
            part = outcome_path(folder, number).with_suffix(".part")
            part.write_bytes(pickle.dumps(outcome))
            part.rename(outcome_path(folder, number))


def started(folder: Path, number: int) -> Path:
    return folder / f"section{number}.started"


def outcome_path(folder: Path, number: int) -> Path:
    return folder / f"section{number}.outcome"


def resumed(schedule: Schedule, section: Section, folder: Path) -> Script:
    """A script that has loaded the last checkpoint, if there is one.

    A save that was killed has left the checkpoint before or the new one, and a script cannot know which. Where they
    have other groups or other trainable parameters, the one that does not fit may be refused: then the other is tried.

    Raises:
        AssertionError: what was loaded is neither.
    """
    promised, attempted = read_number(folder / PROMISED), read_number(folder / ATTEMPTED)
    if dist.is_initialized():
        # A section without a step meets nobody before it saves: the first rank would write what another still reads.
        dist.barrier()
    if attempted < 0:
        return Script(schedule, section, folder)
    for position in sorted({max(promised, 0), attempted}, reverse=True):
        script = Script(schedule, section, folder)
        script.arrange(0, position)
        try:
            script.load()
        except FileNotFoundError:
            assert promised < 0, f"the checkpoint of operation {promised} is gone"
            return Script(schedule, section, folder)
        except Exception:
            if position == max(promised, 0):
                raise
            continue
        assert script.position in (promised, attempted), f"loaded {script.position}, not {promised} or {attempted}"
        # What one has loaded is there: a save that is killed next may not take it away.
        script.promise()
        script.arrange(position, script.position)
        return script
    raise AssertionError("every checkpoint was refused")


class Script:
    """What a training script does in one section, on one rank."""

    def __init__(self, schedule: Schedule, section: Section, folder: Path) -> None:
        self.position = 0
        self._schedule, self._section, self._folder = schedule, section, folder
        shapes = list(schedule.shapes)
        start = initial_weights(shapes, schedule.seed, schedule.dtype)
        self._parameters = shard_parameters(start, LAYOUTS[section.layout])
        self._model = nn.Module()
        self._model.weights = nn.ParameterDict(self._parameters)
        length = len(schedule.operations)
        self._gradients = list(gradient_sequence(shapes, length, schedule.seed, dtype=schedule.dtype))
        first = {name: p for name, p in self._parameters.items() if name != schedule.late}
        self._optimizer: ProdigyPlusScheduleFree = make_optimizer(first, schedule.groups, **EVERY[schedule.switch])
        if schedule.frozen:
            self._parameters[schedule.frozen].requires_grad_(False)

    def arrange(self, start: int, stop: int) -> None:
        """Bring parameters and groups to where some operations leave them."""
        for operation in self._schedule.operations[start:stop]:
            if operation.kind == "unfreeze":
                self._parameters[operation.name].requires_grad_(True)
            elif operation.kind == "add group":
                self._optimizer.add_param_group({"params": [self._parameters[operation.name]], "weight_decay": 0.05})

    def load(self) -> None:
        self.position = load_checkpoint(self._folder / "checkpoint", self._model, self._optimizer)["operation"]

    def run(self) -> Outcome:
        outcome = Outcome(self.position)
        while self.position < self._section.stop:
            if self.position in self._schedule.saves and self.position > outcome.first:
                self._save()
            if self.position in self._schedule.reloads:
                self._optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
            self._do(self._schedule.operations[self.position], outcome)
            outcome.d[self.position] = self._optimizer.get_d()
            self.position += 1
        self._end()
        outcome.groups = [{k: v for k, v in g.items() if k not in NOT_OURS} for g in self._optimizer.param_groups]
        outcome.tensors = self._tensors()
        return outcome

    def _do(self, operation: Operation, outcome: Outcome) -> None:
        optimizer, kind = self._optimizer, operation.kind
        if kind in ("step", "skip"):
            self._step(operation)
        elif kind == "eval":
            optimizer.eval()
        elif kind == "train":
            optimizer.train()
        elif kind == "averaged":
            with averaged(optimizer, self._model):
                outcome.averages[self.position] = gather(self._parameters)
        elif kind == "set":
            optimizer.param_groups[operation.number][operation.name] = operation.value
        else:
            self.arrange(self.position, self.position + 1)

    def _step(self, operation: Operation) -> None:
        gradients = {
            name: gradient if self._has_gradient(name) else None
            for name, gradient in self._gradients[self.position].items()
        }
        if operation.kind == "skip":
            bad = gradients[operation.name]
            assert bad is not None
            bad.view(-1)[operation.number % bad.numel()] = operation.value
        set_grads(self._parameters, gradients)
        self._optimizer.step()

    def _has_gradient(self, name: str) -> bool:
        parameter = self._parameters[name]
        joined = any(p is parameter for group in self._optimizer.param_groups for p in group["params"])
        return joined and parameter.requires_grad

    def _tensors(self) -> dict[str, Tensor]:
        """Weights and z, whole."""
        states = {
            name: self._optimizer.state.get(p, {}).get("z", local(p.detach())) for name, p in self._parameters.items()
        }
        weights, z = gather(self._parameters), gather(self._parameters, states)
        return weights | {f"z of {name}": value for name, value in z.items()}

    def _end(self) -> None:
        ending = self._section.ending
        if ending == "save":
            self._save()
        elif ending == "crash":
            die()
        elif ending == "kill":
            self._save_and_die()

    def promise(self) -> None:
        """Note that what is in the checkpoint goes on from here."""
        self._write(PROMISED)

    def _save(self) -> None:
        self._write(ATTEMPTED)
        save_checkpoint(self._folder / "checkpoint", self._model, self._optimizer, {"operation": self.position})
        self.promise()

    def _save_and_die(self) -> None:
        """Save elsewhere, to know how long that takes, then with a death on the way."""
        part = self._section.when[_rank()]
        watch = Watch()
        begun = time.monotonic()
        with watch:
            save_checkpoint(self._folder / "rehearsal", self._model, self._optimizer, {})
        seconds = time.monotonic() - begun
        try:
            if self._section.by_time:
                threading.Timer(part * MORE * seconds, die).start()
                self._save()
            else:
                with Watch(int(part * MORE * watch.seen)):
                    self._save()
        finally:
            die()

    def _write(self, name: str) -> None:
        if _rank() == 0:
            path = self._folder / name
            path.with_suffix(".new").write_text(str(self.position))
            path.with_suffix(".new").rename(path)


class Watch:
    """Counts the calls of C functions that touch files, and dies before the one at ``at``."""

    def __init__(self, at: int | None = None) -> None:
        self.seen, self._at = 0, at

    def __enter__(self) -> None:
        threading.setprofile(self._look)
        sys.setprofile(self._look)

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _look(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__name__", "") in CALLS:
            if self.seen == self._at:
                die()
            self.seen += 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def read_number(path: Path) -> int:
    return int(path.read_text()) if path.exists() else -1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
