"""A save or load that fails on one rank fails on all, says where and why, and leaves the checkpoint before."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.checkpoints import folder as folders
from ppsf_dist.checkpoints.disk import SummingWriter
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.checkpoints.small import Pair
from tests.harness.layouts import local
from tests.harness.models import D0
from tests.harness.pool import run
from tests.test_state import same, snapshot

pytestmark = pytest.mark.dist


def sharded(steps: int) -> Pair:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 33), nn.Linear(33, 2))
    fully_shard(model)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def state_of(pair: Pair) -> Any:
    weights = {name: local(value.detach()).clone() for name, value in pair[0].named_parameters()}
    return weights, snapshot(pair[1])


def error_of(task: Callable[[], object]) -> tuple[str, str]:
    try:
        task()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@contextmanager
def full_disk() -> Iterator[None]:
    write = SummingWriter.write

    def fail(file: SummingWriter, data: Any) -> int:
        if file.tell() > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    with patch.object(SummingWriter, "write", fail):
        yield


@contextmanager
def data_goes_elsewhere() -> Iterator[None]:
    """As on a disk that the first rank does not see."""
    close = SummingWriter.close

    def fail(file: SummingWriter) -> None:
        name, was_open = file.raw.name, not file.closed  # type: ignore[attr-defined]
        close(file)
        if was_open:
            os.unlink(name)

    with patch.object(SummingWriter, "close", fail):
        yield


def without_waiting_for_the_disk(path: Path) -> dict[str, tuple[str, str]]:
    with patch.object(os, "fsync", lambda descriptor: None):
        return every_failure(path)


def every_failure(path: Path) -> dict[str, tuple[str, str]]:
    rank = dist.get_rank()
    run_folder, own = path / "run", path / f"disk {rank}"
    pair = sharded(2)
    save_checkpoint(run_folder, *pair, {"step": 1})
    (own / "0").mkdir(parents=True)
    if rank == 0:
        (path / "file").touch()
    dist.barrier()
    errors = {
        "file": error_of(lambda: save_checkpoint(path / "file", *pair)),
        "unmade": error_of(lambda: save_checkpoint(path / "file" / "below", *pair)),
        "extra": error_of(lambda: save_checkpoint(run_folder, *pair, {"a": {1, 2} if rank else 1})),
        "missing": error_of(lambda: load_checkpoint(run_folder if rank == 0 else path / "nothing", *pair)),
        "missing on the first": error_of(lambda: load_checkpoint(run_folder if rank else path / "nothing", *pair)),
    }
    with patch.object(folders, "VISIBLE_SECONDS", 0.2):
        errors["other path"] = error_of(lambda: save_checkpoint(run_folder if rank == 0 else own, *pair))
        with data_goes_elsewhere() if rank == 1 else patch.dict({}):
            errors["own disk"] = error_of(lambda: save_checkpoint(run_folder, *pair))
    with full_disk() if rank == 1 else patch.dict({}):
        errors["full"] = error_of(lambda: save_checkpoint(run_folder, *pair))

    # All of that has left the checkpoint, and no weight was written.
    before = state_of(pair)
    assert load_checkpoint(run_folder, *pair) == {"step": 1}
    assert same(before, state_of(pair))
    dist.barrier()
    damaged = run_folder / "0" / "__1_0.distcp"
    whole = damaged.read_bytes()
    dist.barrier()
    if rank == 0:
        damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    dist.barrier()
    other = sharded(1)
    before = state_of(other)
    errors["damaged"] = error_of(lambda: load_checkpoint(run_folder, *other))
    # What only one rank refuses: its optimizer is another one's.
    if rank == 0:
        damaged.write_bytes(whole)
    dist.barrier()
    other[1].param_groups[0]["use_speed"] = bool(rank)
    errors["switch"] = error_of(lambda: load_checkpoint(run_folder, *other))
    other[1].param_groups[0]["use_speed"] = False
    assert same(before, state_of(other))
    save_checkpoint(run_folder, *pair, {"step": 2})
    if rank == 0:
        errors["left"] = ("", " ".join(sorted(entry.name for entry in run_folder.iterdir())))
    return errors


EXPECTED = {
    "file": ("NotADirectoryError", "rank 0 of 2: NotADirectoryError: path is"),
    "unmade": ("NotADirectoryError", "rank 0 of 2: NotADirectoryError"),
    "extra": ("TypeError", "rank 1 of 2: TypeError: extra is {'a': {1, 2}}"),
    "missing": ("ValueError", "rank 1 of 2: ValueError"),
    "missing on the first": ("FileNotFoundError", "rank 0 of 2: FileNotFoundError"),
    "other path": ("FileNotFoundError", "rank 1 of 2: FileNotFoundError"),
    "own disk": ("FileNotFoundError", "rank 0 of 2: FileNotFoundError"),
    "full": ("OSError", "rank 1 of 2: OSError: [Errno 28] No space left on device"),
    "damaged": ("ValueError", "checksum"),
    "switch": ("ValueError", "rank 1 of 2: ValueError: use_speed"),
}


def test_each_failure_reaches_both_ranks(tmp_path: Path) -> None:
    first, second = run(2, without_waiting_for_the_disk, tmp_path)
    # Nothing of the failed saves is left.
    assert first.pop("left") == ("", "1 latest lock")
    assert first == second and first.keys() == EXPECTED.keys()
    for name, (kind, text) in EXPECTED.items():
        assert first[name][0] == kind and text in first[name][1], (name, first[name])
