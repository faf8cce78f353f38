"""Checkpoints whose files are damaged, and what loading them does."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.harness.layouts import LAYOUTS, set_grads, shard_parameters
from tests.harness.models import NamedShapes, gradient_sequence, initial_weights
from tests.runs import make_optimizer
from tests.thorough.cases import local

SHAPES: NamedShapes = [("factored", (33, 34)), ("small", (5, 3)), ("vector", (13,))]
NEW, OLD, OTHER = "new", "old", "other"
"""Three saves: the one that is damaged; an earlier one of its run; one of another run with the same shapes."""


@dataclass(frozen=True)
class Damage:
    """What happens to one file, named relative to the checkpoint.

    Attributes:
        kind: "flip" a bit, "truncate" or "extend" to a size, "zero" the last bytes, "swap" with the file of the same
            name in another save, "exchange" with another file of the same save, or "delete".
        place: bit, size, number of bytes, or number of the other file.
        source: the other save.
    """

    file: str
    kind: str
    place: int = 0
    source: str = ""


def damages(sizes: dict[str, int], others: dict[str, set[str]], flips: int, seed: int) -> Iterator[Damage]:
    """What to try with the files of one checkpoint.

    Args:
        sizes: in bytes, by file.
        others: the files of other saves, by save.
        flips: how many bits of each file to flip; half as many lengths to cut it to.
    """
    random_ = random.Random(f"damage {seed}")
    for file, size in sorted(sizes.items()):
        yield Damage(file, "delete")
        for source, names in sorted(others.items()):
            if file in names:
                yield Damage(file, "swap", source=source)
        for index in range(len(sizes)):
            if sorted(sizes)[index] != file:
                yield Damage(file, "exchange", index)
        if size:
            yield from (Damage(file, "flip", random_.randrange(8 * size)) for _ in range(flips))
            cuts = {0, size - 1, size // 2, *(random_.randrange(size) for _ in range(flips // 2))}
            yield from (Damage(file, "truncate", cut) for cut in sorted(cuts))
            yield from (Damage(file, "zero", min(size, count)) for count in (1, 64, size))
        yield from (Damage(file, "extend", size + more) for more in (1, 512))


def apply(damage: Damage, path: Path, folder: Path) -> None:
    """Damage the checkpoint ``folder / path``."""
    target = path / damage.file
    if damage.kind == "delete":
        target.unlink()
    elif damage.kind == "swap":
        shutil.copyfile(folder / damage.source / damage.file, target)
    elif damage.kind == "exchange":
        other = path / sorted(files(path))[damage.place]
        mine, theirs = target.read_bytes(), other.read_bytes()
        target.write_bytes(theirs)
        other.write_bytes(mine)
    elif damage.kind == "flip":
        content = bytearray(target.read_bytes())
        content[damage.place // 8] ^= 1 << damage.place % 8
        target.write_bytes(content)
    elif damage.kind == "zero":
        content = bytearray(target.read_bytes())
        content[len(content) - damage.place :] = bytes(damage.place)
        target.write_bytes(content)
    else:
        os.truncate(target, damage.place)


def files(path: Path) -> dict[str, int]:
    """The size of each file of a checkpoint, by its name relative to it."""
    return {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}


def make_checkpoints(layout: str, folder: Path) -> None:
    """Save ``OLD``, ``NEW`` and ``OTHER``."""
    model, optimizer = build(layout, seed=0)
    for name, step in ((OLD, 2), (NEW, 3)):
        train(model, optimizer, step, seed=0)
        save_checkpoint(folder / name, model, optimizer, {"step": step, "name": "run"})
    model, optimizer = build(layout, seed=1)
    train(model, optimizer, 3, seed=1)
    save_checkpoint(folder / OTHER, model, optimizer, {"step": 3, "name": "run"})


def build(layout: str, seed: int) -> tuple[nn.Module, ProdigyPlusScheduleFree]:
    parameters = shard_parameters(initial_weights(SHAPES, seed), LAYOUTS[layout])
    model = nn.Module()
    model.weights = nn.ParameterDict(parameters)
    return model, make_optimizer(parameters, 2)


def train(model: nn.Module, optimizer: ProdigyPlusScheduleFree, steps: int, seed: int) -> None:
    parameters = {name.removeprefix("weights."): p for name, p in model.named_parameters()}
    for gradients in gradient_sequence(SHAPES, steps, seed):
        set_grads(parameters, gradients)
        optimizer.step()


def content(model: nn.Module, optimizer: ProdigyPlusScheduleFree) -> list[Any]:
    """All live values, tensors copied."""
    optimizer.get_d()
    tensors = [local(p.detach()).clone() for p in model.parameters()]
    state: list[Any] = [
        (name, value.clone() if isinstance(value, Tensor) else value)
        for p in model.parameters()
        for name, value in sorted(optimizer.state.get(p, {}).items())
    ]
    groups = [(k, v) for group in optimizer.param_groups for k, v in sorted(group.items()) if k != "params"]
    return [*tensors, *state, *groups]


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, in the same places."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def load_damaged(layout: str, folder: Path, wanted: list[Damage], finished: Path) -> dict[Damage, str]:
    """Load the damaged ``NEW`` for each damage; what is wrong on this rank with what that did, if anything is.

    ``finished`` counts the cases, for a world that hangs or dies in one.
    """
    model, optimizer = build(layout, seed=0)
    assert load_checkpoint(folder / NEW, model, optimizer) == {"step": 3, "name": "run"}
    saved = content(model, optimizer)
    model, optimizer = build(layout, seed=2)
    train(model, optimizer, 2, seed=2)
    before = content(model, optimizer)
    problems = {}
    for index, damage in enumerate(wanted):
        copy = folder / f"damaged{index}"
        if _rank() == 0:
            shutil.copytree(folder / NEW, copy, symlinks=True)
            apply(damage, copy, folder)
        _barrier()
        problem, changed = _load(copy, model, optimizer, before, saved)
        if problem:
            problems[damage] = problem
        _barrier()
        if _rank() == 0:
            shutil.rmtree(copy)
            finished.write_text(str(index + 1))
        if changed:
            model, optimizer = build(layout, seed=2)
            train(model, optimizer, 2, seed=2)
    return problems


def _load(
    copy: Path, model: nn.Module, optimizer: ProdigyPlusScheduleFree, before: list[Any], saved: list[Any]
) -> tuple[str, bool]:
    """What is wrong, or an empty string, and whether anything has changed."""
    try:
        extra = load_checkpoint(copy, model, optimizer)
    except Exception as error:
        after = content(model, optimizer)
        untouched = equal(after, before)
        return "" if untouched else f"raised {type(error).__name__}, but had changed live values", not untouched
    except BaseException as error:
        return f"raised {type(error).__name__}, which is no Exception", True
    right = equal(content(model, optimizer), saved) and extra == {"step": 3, "name": "run"}
    return "" if right else "loaded something else", True


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
