"""The folder of a run: ``latest`` names the last finished save, which is a folder of its own beside it."""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ppsf_dist.checkpoints.disk import Sum, is_folder, open_file, replace, sync_folder, write_new
from ppsf_dist.checkpoints.lock import LOCK, hold, let_go
from ppsf_dist.checkpoints.manifest import MANIFEST, Manifest
from ppsf_dist.checkpoints.metadata import read_metadata

LATEST = "latest"
EXTRA = "extra.json"

MARKS = (MANIFEST, f"{MANIFEST}.new")
"""A folder that has one of these was made by a save, finished or not."""

VISIBLE_SECONDS = 10.0
"""How long a network file system may take until one host sees what another has written."""

_POINTER = re.compile(r"(?P<name>[0-9]{1,18})(\s+(?P<crc32>[0-9a-f]{8}))?\s*", re.ASCII)
_WRITTEN = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|extra\.json|ppsf_dist\.json(\.new)?", re.ASCII)
"""Names of the files that a save writes."""

_logger = logging.getLogger(__name__)
_last: dict[Path, str] = {}
"""The save that this process has last written to a path, or loaded from it."""


class Pointer(NamedTuple):
    """What ``latest`` says.

    Args:
        name: of the folder.
        crc32: of its manifest; None in checkpoints of the first releases.
    """

    name: str
    crc32: int | None


def read_pointer(root: Path) -> Pointer | None:
    """Which save is the last finished one, or None.

    Raises:
        ValueError: the file ``latest`` holds no number.
    """
    path = root / LATEST
    try:
        with open_file(path) as file:
            text = file.read(100).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    match = _POINTER.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{path} holds {text!r} and not the number of a folder beside it: put the number of the folder to load "
            "there, or remove it to start anew"
        )
    crc32 = match["crc32"]
    return Pointer(match["name"], None if crc32 is None else int(crc32, 16))


def finished(root: Path) -> Pointer:
    """Which save is the last finished one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file ``latest`` holds no number, or that of a folder that is not there or is a link.
    """
    pointer = read_pointer(root)
    if pointer is None:
        raise FileNotFoundError(f"{root} holds no finished checkpoint: expected a file {LATEST!r} in it")
    folder = root / pointer.name
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, which is not followed: put the folder itself there")
    if not folder.is_dir():
        raise ValueError(
            f"{root / LATEST} names the folder {pointer.name}, which is not there: put the number of one that is there "
            "in it, or remove it to start anew"
        )
    return pointer


def remember(root: Path, save: str) -> None:
    """Let this process save over a checkpoint that it has loaded."""
    _last[root.resolve()] = save


def release_checkpoint(path: str | os.PathLike[str] | None = None) -> None:
    """Let other jobs save to a path to which this process has saved, without waiting for its end. Not collective.

    Args:
        path: folder of the run. Default: every one.
    """
    let_go(None if path is None else Path(path))
    for root in list(_last) if path is None else [Path(path).resolve()]:
        _last.pop(root, None)


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Remove what saves have made in a folder, and the folder itself if nothing else is in it. Not collective.

    Args:
        path: folder of the run. One that does not exist is removed already.

    Raises:
        RuntimeError: another job saves there.
        ValueError: the file ``latest`` holds no number.
    """
    root = Path(path)
    if not root.exists():
        return
    hold(root)
    before = read_pointer(root)
    if before is not None:
        _mark(root / before.name)
    # A removal that is killed must not leave the name of what is gone.
    for name in (LATEST, f"{LATEST}.new"):
        (root / name).unlink(missing_ok=True)
    _remove_saves(root, keep=None)
    (root / LOCK).unlink(missing_ok=True)
    release_checkpoint(root)
    # What is left is not ours.
    with suppress(OSError):
        root.rmdir()


class Save:
    """A save under way, on the rank that leads it. Makes the folder; what another save has made is never written to.

    Args:
        root: folder of the run, made if need be.

    Raises:
        FileExistsError: the name that the folder needs is taken by something else.
        NotADirectoryError: ``root`` is no folder.
        RuntimeError: another job saves to ``root``, or has done so since this one did.
        ValueError: the file ``latest`` holds no number.
    """

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise NotADirectoryError(f"path is {root}, which is no folder: give the folder of this run's checkpoint")
        _make(root)
        hold(root)
        self._root = root
        self._before = read_pointer(root)
        self._refuse_others()
        number = 0 if self._before is None else int(self._before.name) + 1
        self.folder = root / str(number)
        self.name = uuid.uuid4().hex
        _clear(self.folder)
        self.folder.mkdir()
        Manifest(self.name).write(self.folder)
        sync_folder(root)

    def finish(self, files: Mapping[str, Sum], extra: bytes) -> None:
        """Make this save the one to load, once everything is on disk, and remove the one before.

        Args:
            files: what all ranks have written.
            extra: content of the file beside the state.

        Raises:
            FileNotFoundError: this rank does not see what another has written.
        """
        for name, expected in files.items():
            wait_for(self.folder / name, expected.length)
        files = {**files, EXTRA: write_new(self.folder / EXTRA, extra)}
        own = Manifest(self.name, files).write(self.folder)
        replace(self._root / LATEST, f"{self.folder.name}\n{own.crc32:08x}\n".encode())
        remember(self._root, self.name)
        if self._before is not None:
            _mark(self._root / self._before.name)
        _remove_saves(self._root, keep=self.folder)

    def abandon(self) -> None:
        """Remove what an unfinished save has written: what failed may be the lack of space."""
        pointer = read_pointer(self._root)
        if pointer is None or pointer.name != self.folder.name:
            _remove(self.folder)

    def _refuse_others(self) -> None:
        mine = _last.get(self._root.resolve())
        if mine is None or self._before is None:
            return
        current = self._root / self._before.name
        if not (current / MANIFEST).exists() or Manifest.read(current).save != mine:
            raise RuntimeError(
                f"path is {self._root}, where another job has saved since this one did: give each job a path of its "
                "own, or load that checkpoint first"
            )


def wait_for(path: Path, length: int | None = None) -> None:
    """Wait until this host sees a file that another one has written.

    Args:
        path: of the file.
        length: in bytes, where it is known.

    Raises:
        FileNotFoundError: it does not.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not _is_there(path, length):
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{path} was written by another rank and is not seen here: path must be one folder that all hosts share"
            )
        time.sleep(0.05)


def _is_there(path: Path, length: int | None) -> bool:
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        return False
    return length is None or found == length


def _make(root: Path) -> None:
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _remove_saves(root: Path, keep: Path | None) -> None:
    """Remove every marked folder but one."""
    for other in root.iterdir():
        is_save = re.fullmatch("[0-9]+", other.name, re.ASCII) and is_folder(other) and _is_marked(other)
        if is_save and other != keep:
            try:
                left = _remove(other)
            except OSError as error:
                left = str(error)
            if left:
                _logger.warning("the checkpoint %s is out of date and could not be removed: %s", other, left)


def _clear(folder: Path) -> None:
    """Remove what a save that was killed has left under this name.

    Raises:
        FileExistsError: something else has the name, or lies in the folder.
    """
    if not os.path.lexists(folder):
        return
    left = "it is none"
    if is_folder(folder):
        # A save may be killed before it has marked its folder.
        empty = not any(folder.iterdir())
        left = _remove(folder) if empty or _is_marked(folder) else f"it has no file {MANIFEST}"
    if left:
        raise FileExistsError(
            f"this save needs the name {folder} for a folder of its own, and what has it was not left by another save "
            f"({left}): move it elsewhere, or give another path"
        )


def _remove(folder: Path) -> str:
    """Remove the files that a save writes, the mark last, and the folder; says what was left."""
    names = sorted(entry.name for entry in folder.iterdir())
    others = [name for name in names if not _WRITTEN.fullmatch(name)]
    for name in names:
        if name not in others and name not in MARKS:
            (folder / name).unlink()
    if others:
        return f"it holds {others[0]!r}"
    for name in MARKS:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    return ""


def _is_marked(folder: Path) -> bool:
    return any((folder / name).exists() for name in MARKS)


def _mark(folder: Path) -> None:
    """Mark a save of the first releases, which made no mark, if a folder that ``latest`` has named is one."""
    if not is_folder(folder) or _is_marked(folder):
        return
    if not all(_WRITTEN.fullmatch(entry.name) for entry in folder.iterdir()):
        return
    try:
        paths = read_metadata(folder).planner_data.values()
    except (OSError, ValueError):
        return
    if {path[0] for path in paths} == {"model", "optimizer"}:
        Manifest("").write(folder)
