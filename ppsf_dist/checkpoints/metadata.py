"""The list of what a checkpoint holds, read so that a list made by a stranger runs no code."""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from ppsf_dist.checkpoints.disk import open_file
from ppsf_dist.checkpoints.manifest import ADVICE

METADATA = ".metadata"

_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{(torch_metadata.__name__, name): getattr(torch_metadata, name) for name in _CLASSES},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the save was written to, which nothing looks at: no path of this system is needed for that.
    **{
        (module, f"{system}Path"): getattr(pathlib, f"Pure{system}Path")
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows")
    },
}
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_FILE = re.compile(r"__\d+_\d+\.distcp", re.ASCII)


class _Unpickler(pickle.Unpickler):
    """Makes the classes that torch's list consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found: Any = _ALLOWED.get((module, name)) or (_DTYPES.get(name) if module == "torch" else None)
        if found is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no list of tensors needs: a file that runs code looks like this"
            )
        return found


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint holds, and where: the file that ``torch.distributed.checkpoint`` has written.

    Raises:
        OSError: the file, or one that it names, cannot be read.
        ValueError: it is damaged, asks for code to run, or names files that are not there whole.
    """
    path = folder / METADATA
    with open_file(path) as file:
        metadata = _unpickle(file, path)
    try:
        _check(metadata, folder)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no list of tensors: {ADVICE}") from error
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def _unpickle(file: IO[bytes], path: Path) -> Metadata:
    try:
        metadata = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not read: {error}") from error
    except Exception as error:
        # Bytes that are no pickle raise whatever they happen to ask for.
        raise ValueError(f"{path} is no list of tensors ({type(error).__name__}: {error}): {ADVICE}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} is no list of tensors: {ADVICE}")
    return metadata


def _check(metadata: Metadata, folder: Path) -> None:
    """Look at everything that is used as a name, a place or a size."""
    sizes: dict[str, int] = {}
    for index, where in metadata.storage_data.items():
        name = where.relative_path
        if not _FILE.fullmatch(name):
            raise ValueError(f"{folder / METADATA} names the file {name!r}, which no save writes: {ADVICE}")
        if getattr(where, "transform_descriptors", None):
            raise ValueError(f"{folder / name} is transformed, which no save here does: {ADVICE}")
        if name not in sizes:
            with open_file(folder / name) as file:
                sizes[name] = os.fstat(file.fileno()).st_size
        if not isinstance(index, MetadataIndex) or where.offset < 0 or where.offset + where.length > sizes[name]:
            raise ValueError(
                f"{folder / name} has {sizes[name]} bytes and {where.offset + where.length} are needed: {ADVICE}"
            )
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        if not isinstance(metadata.planner_data[key], tuple):
            raise TypeError(key)
