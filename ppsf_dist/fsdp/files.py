"""A distributed checkpoint on disk: what it holds, and single entries of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

Entry = tuple[Any, ...]
"""Path of an entry in a nested state dict."""


class CheckpointFiles:
    """A folder that ``torch.distributed.checkpoint`` has written. No function here is collective.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = FileSystemReader(folder).read_metadata()
        # The names of nested entries are joined with dots, which the names of parameters have too.
        self._keys: dict[Entry, str] = {tuple(path): key for key, path in self._metadata.planner_data.items()}

    def below(self, *path: str) -> list[Entry]:
        """The paths of all entries below one."""
        return [other for other in self._keys if other[: len(path)] == path]

    def read(self, paths: list[Entry]) -> dict[Entry, Any]:
        """The entries at the given paths, tensors whole.

        Raises:
            ValueError: the checkpoint has no such entry.
        """
        entries = {self._key(path): self._empty(self._key(path)) for path in paths}
        load(entries, checkpoint_id=self._folder, no_dist=True)
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
                    f"{name} has shape {size} in the checkpoint {self._folder} and {tuple(shape)} here: it is another "
                    "model's"
                )

    def _key(self, path: Entry) -> str:
        if path not in self._keys:
            name = ".".join(map(str, path))
            raise ValueError(f"the checkpoint {self._folder} has no {name}: it is another model's")
        return self._keys[path]

    def _empty(self, key: str) -> Tensor | None:
        entry = self._metadata.state_dict_metadata[key]
        if isinstance(entry, TensorStorageMetadata):
            return torch.empty(entry.size, dtype=entry.properties.dtype)
        return None
