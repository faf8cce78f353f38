"""A checkpoint from a stranger runs no code, wherever the code is put."""

from __future__ import annotations

import io
import pickle
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from ppsf_dist.checkpoints import SafePlanner, SafeReader
from ppsf_dist.checkpoints.disk import sum_of
from ppsf_dist.checkpoints.manifest import Manifest
from ppsf_dist.checkpoints.metadata import read_metadata
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.checkpoints.small import DATA, EXTRA, METADATA, content, fresh, saved, trained
from tests.test_state import same


class Bomb:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def sign(path: Path) -> None:
    """Make the checksums right again, as a stranger would."""
    folder = path / "0"
    manifest = Manifest.read(folder)
    own = Manifest(manifest.save, {name: sum_of(folder / name) for name in manifest.files}).write(folder)
    (path / "latest").write_text(f"0\n{own.crc32:08x}\n")


def rewrite(folder: Path, metadata: Metadata) -> None:
    # What is read keeps no path of a system.
    metadata.storage_meta = None
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def metadata_itself(folder: Path, bomb: Bomb) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(bomb))


def a_field_of_metadata(folder: Path, bomb: Bomb) -> None:
    metadata = read_metadata(folder)
    metadata.storage_meta = bomb  # type: ignore[assignment]
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def a_key_of_metadata(folder: Path, bomb: Bomb) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Metadata({"model.0.weight": bomb})))  # type: ignore[dict-item]


def replaced(folder: Path, key: str, data: bytes) -> None:
    """Put other bytes in the place of an entry, at the end of the file."""
    metadata = read_metadata(folder)
    whole = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(whole + data)
    where = next(where for index, where in metadata.storage_data.items() if index.fqn == key)
    where.offset, where.length = len(whole), len(data)
    rewrite(folder, metadata)


def in_torch_file(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def a_number_of_a_group(folder: Path, bomb: Bomb) -> None:
    replaced(folder, "optimizer.param_groups.0.lr", in_torch_file(bomb))


def a_number_as_a_bare_pickle(folder: Path, bomb: Bomb) -> None:
    replaced(folder, "optimizer.param_groups.0.lr", pickle.dumps(bomb))


def a_tensor(folder: Path, bomb: Bomb) -> None:
    replaced(folder, "model.0.weight", in_torch_file(bomb))


def extra(folder: Path, bomb: Bomb) -> None:
    (folder / EXTRA).write_bytes(pickle.dumps(bomb))


PLACES: dict[Callable[[Path, Bomb], None], str] = {
    metadata_itself: r"\.metadata is not read: it asks for pathlib.*Path",
    a_field_of_metadata: r"\.metadata is not read: it asks for pathlib.*Path",
    a_key_of_metadata: r"\.metadata is not read: it asks for pathlib.*Path",
    a_number_of_a_group: "lr of a checkpoint is not read, because it is no plain data",
    a_number_as_a_bare_pickle: "lr of a checkpoint is not read, because it is no plain data",
    a_tensor: "cannot be read",
    extra: "extra.json is no JSON",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_code_runs_wherever_it_is_put(place: Callable[[Path, Bomb], None], tmp_path: Path) -> None:
    path, mark, pair = tmp_path / "run", tmp_path / "ran", trained(1, seed=1)
    saved(path)
    place(path / "0", Bomb(mark))
    sign(path)
    before = content(pair)
    for verify in (True, False):
        with pytest.raises(ValueError, match=PLACES[place]):
            load_checkpoint(path, *pair, verify=verify)
    # A save over it looks at it too.
    saved(path)
    assert not mark.exists() and same(before, content(pair))


def test_torchs_own_load_runs_none_with_our_reader_and_planner(tmp_path: Path) -> None:
    path, mark = tmp_path / "run", tmp_path / "ran"
    for place in (a_field_of_metadata, a_number_of_a_group):
        saved(path)
        folder = path / (path / "latest").read_text().split()[0]
        place(folder, Bomb(mark))
        state = {"optimizer": {"param_groups": [{"lr": 0.0}]}}
        with warnings.catch_warnings(), pytest.raises(BaseException, match="code"):
            warnings.simplefilter("ignore")
            load(state, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True)
        assert not mark.exists()


@pytest.mark.parametrize("name", ["../1/__0_0.distcp", "/etc/passwd", "extra.json", "__0_0.distcp/../x"])
def test_the_list_names_files_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    metadata = read_metadata(tmp_path / "0")
    next(iter(metadata.storage_data.values())).relative_path = name
    rewrite(tmp_path / "0", metadata)
    with pytest.raises(ValueError, match="which no save writes"):
        load_checkpoint(tmp_path, *fresh(), verify=False)


class Setting:
    """A class of a person's own in the state of a module."""


class Owner(nn.Linear):
    def get_extra_state(self) -> Setting:
        return Setting()

    def set_extra_state(self, state: Setting) -> None:
        assert isinstance(state, Setting)


def test_a_persons_own_classes_are_allowed_by_name(tmp_path: Path) -> None:
    _, optimizer = fresh()
    model = Owner(2, 2)
    optimizer = type(optimizer)(model.parameters())
    save_checkpoint(tmp_path, model, optimizer)
    with pytest.raises(ValueError, match="model._extra_state of a checkpoint is not read.*add_safe_globals"):
        load_checkpoint(tmp_path, model, optimizer)
    with torch.serialization.safe_globals([Setting]):
        load_checkpoint(tmp_path, model, optimizer)


def test_the_mark_of_a_checksum_is_that_of_zlib(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"checkpoint" * 200_000)
    assert sum_of(tmp_path / "file") == (2_000_000, zlib.crc32(b"checkpoint" * 200_000))
