"""A checkpoint on disk: what it holds, and how it is read."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ppsf_dist.checkpoints.disk import open_file
from ppsf_dist.checkpoints.folder import EXTRA, Pointer, finished, remember
from ppsf_dist.checkpoints.manifest import ADVICE, MANIFEST, Manifest
from ppsf_dist.checkpoints.metadata import METADATA, read_metadata
from ppsf_dist.checkpoints.plain import load_plain
from ppsf_dist.sharding import everyone, together, told_by_first

Entry = tuple[Any, ...]
"""Path of an entry in a nested state dict."""

Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


class SafeReader(FileSystemReader):
    """Torch's reader with a list of contents that is read through ``read_metadata``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class SafePlanner(DefaultLoadPlanner):
    """Torch's planner for which what is no tensor is plain data, or a class of ``torch.serialization.safe_globals``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = load_plain(value, f"{name} of a checkpoint")
        *parents, last = self.mappings[name]
        container: Any = self.original_state_dict
        for key in parents:
            container = container[key]
        container[last] = loaded


class CheckpointFiles:
    """A folder that a save has written. No function here is collective; ``open_checkpoint`` is.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        # The names of nested entries are joined with dots, which the names of parameters have too.
        self._keys: dict[Entry, str] = {tuple(path): key for key, path in self._metadata.planner_data.items()}
        self.extra = _read_extra(folder)

    def below(self, *path: str) -> list[Entry]:
        """The paths of all entries below one."""
        return [other for other in self._keys if other[: len(path)] == path]

    def load(self, state: dict[str, Any]) -> None:
        """Read what belongs into the tensors of a nested state dict, and put everything else in its place.

        Raises:
            OSError: a file cannot be read.
            ValueError: it holds something else than its list says, or another shape than is asked for.
        """
        planner, reader = SafePlanner(), SafeReader(self.folder)
        try:
            planner.set_up_planner(state, self._metadata, is_coordinator=True)
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            reader.read_data(planner.finish_plan(plan), planner).wait()
        except (RuntimeError, AssertionError, LookupError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"the checkpoint {self.folder} cannot be read: {error}") from error

    def read(self, paths: list[Entry]) -> dict[Entry, Any]:
        """The entries at the given paths, tensors whole.

        Raises:
            OSError: a file cannot be read.
            ValueError: the checkpoint has no such entry, or another one than its list says.
        """
        entries = {self._key(path): self._empty(self._key(path)) for path in paths}
        self.load(entries)
        return {path: entries[self._key(path)] for path in paths}

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, whose entries are stored one by one."""
        groups: dict[int, dict[str, Any]] = {}
        for (_, _, index, name), value in self.read(self.below("optimizer", "param_groups")).items():
            groups.setdefault(index, {})[name] = value
        return [groups[index] for index in sorted(groups)]

    def check_model(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare the model's tensors with those of the checkpoint, before anything is loaded.

        Args:
            shapes: of the whole tensors, by their names in the model.

        Raises:
            ValueError: one of them is missing in the checkpoint, or has another shape there.
        """
        for name, shape in shapes.items():
            saved = self._metadata.state_dict_metadata[self._key(("model", name))]
            size = tuple(saved.size) if isinstance(saved, TensorStorageMetadata) else None
            if size != tuple(shape):
                raise ValueError(
                    f"{name} has shape {size} in the checkpoint {self.folder} and {tuple(shape)} here: it is another "
                    "model's"
                )

    def _key(self, path: Entry) -> str:
        if path not in self._keys:
            name = ".".join(map(str, path))
            raise ValueError(f"the checkpoint {self.folder} has no {name}: it is another model's")
        return self._keys[path]

    def _empty(self, key: str) -> Tensor | None:
        entry = self._metadata.state_dict_metadata[key]
        if isinstance(entry, TensorStorageMetadata):
            return torch.empty(entry.size, dtype=entry.properties.dtype)
        return None


def open_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> CheckpointFiles:
    """The last finished checkpoint of a run, looked at as a whole before anything of it is used. Collective.

    The first rank says which one it is, and the ranks share the files between them to check.

    Args:
        path: folder of the run.
        verify: compare every file with the checksum that the save has noted.

    Raises:
        FileNotFoundError: ``path`` holds no finished checkpoint.
        ValueError: a file is damaged, missing, of another save, or not what a save writes; or another rank finds that.
    """
    root, team = Path(path), everyone()
    pointer = told_by_first(team, lambda: finished(root))

    def look() -> CheckpointFiles:
        try:
            manifest = _manifest(root, pointer, verify)
            if manifest is not None and verify:
                manifest.check(root / pointer.name, manifest.share(team.group_rank, max(1, len(team.ranks))))
            files = CheckpointFiles(root / pointer.name)
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename} is missing on this rank: a checkpoint must be whole, and lie in one folder that all "
                "hosts share"
            ) from error
        if manifest is not None:
            remember(root, manifest.save)
        elif verify and team.is_first:
            _logger.warning("%s was saved by an early release, without checksums: it is not verified", files.folder)
        return files

    return together(team, look)


def _manifest(root: Path, pointer: Pointer, verify: bool) -> Manifest | None:
    """What the save has written, or None in checkpoints of the first releases."""
    folder = root / pointer.name
    if pointer.crc32 is None and not (folder / MANIFEST).exists():
        return None
    with open_file(folder / MANIFEST) as file:
        crc32 = zlib.crc32(file.read())
    if verify and crc32 != pointer.crc32:
        raise ValueError(f"{folder / MANIFEST} and {root / 'latest'} are not of the same save: {ADVICE}")
    manifest = Manifest.read(folder)
    if verify and not {METADATA, EXTRA} <= manifest.files.keys():
        raise ValueError(f"{folder} holds a save that did not come to its end: {ADVICE}")
    return manifest


def _read_extra(folder: Path) -> dict[str, Any]:
    """The plain values that lie beside the state."""
    with open_file(folder / EXTRA) as file:
        content = file.read()
    try:
        extra = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{folder / EXTRA} is no JSON ({error}): {ADVICE}") from error
    if not isinstance(extra, dict):
        raise ValueError(f"{folder / EXTRA} holds a {type(extra).__name__} and not a dictionary: {ADVICE}")
    return extra
