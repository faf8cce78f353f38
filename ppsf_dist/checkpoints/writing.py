"""How a checkpoint is written: by all ranks into a new folder, which the first of them makes the one to load."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ppsf_dist.checkpoints.disk import Sum, SummingWriter
from ppsf_dist.checkpoints.folder import Save, wait_for
from ppsf_dist.checkpoints.manifest import MANIFEST
from ppsf_dist.sharding import Team, everyone, from_every_rank, raise_failures, together, told_by_first


class _NewFiles(FileSystem):
    """Torch's way to the disk, with new files that are summed as they are written."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with SummingWriter(Path(path)) as stream:
            yield stream
        self.sums[Path(path).name] = stream.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """Torch's writer into a folder that holds no checkpoint. Files are on disk when they are closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False, overwrite=False)
        self.files = self.fs = _NewFiles()


def write_checkpoint(
    path: str | os.PathLike[str], make_state: Callable[[], dict[str, Any]], extra: dict[str, Any] | None = None
) -> None:
    """Save the state dicts of model and optimizer beside the checkpoint before, which goes when this one is complete.

    Collective. What can be refused is refused before the state is made, and on every rank.

    Args:
        path: folder of the run.
        make_state: makes ``{"model": ..., "optimizer": ...}``; may be collective.
        extra: values that JSON can hold; those of the first rank are saved.

    Raises:
        TypeError, ValueError: ``extra`` holds something that JSON cannot.
        OSError: some rank cannot write; the message names it. The checkpoint before is the one to load then.
        RuntimeError: another job saves to ``path``.
    """
    team, root = everyone(), Path(path)
    content = together(team, lambda: _encoded(extra))
    begun: list[Save] = []
    try:
        folder = root / told_by_first(team, lambda: _begin(root, begun))
        together(team, lambda: wait_for(folder / MANIFEST))
        files = _write(team, folder, make_state())
        told_by_first(team, lambda: begun[0].finish(files, content))
    except BaseException:
        for unfinished in begun:
            with suppress(OSError, ValueError):
                unfinished.abandon()
        raise


def _begin(root: Path, begun: list[Save]) -> str:
    begun.append(Save(root))
    return begun[0].folder.name


def _encoded(extra: dict[str, Any] | None) -> bytes:
    try:
        return json.dumps(extra or {}).encode()
    except (TypeError, ValueError) as error:
        raise type(error)(f"extra is {extra!r}, of which JSON cannot hold everything: {error}") from error


def _write(team: Team, folder: Path, state: dict[str, Any]) -> dict[str, Sum]:
    """Write the state; returns the files of all ranks."""
    writer = _Writer(folder)
    try:
        save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        failures = {rank: cause for rank, (cause, _) in error.failures.items()}
        raise_failures(team.ranks or (0,), cast(Any, failures), team.group_rank)
    files: dict[str, Sum] = {}
    for theirs in from_every_rank(team, lambda: writer.files.sums):
        files.update(theirs)
    return files
