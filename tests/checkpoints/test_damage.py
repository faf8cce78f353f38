"""A checkpoint that is not what was saved is refused before anything is changed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from ppsf_dist.checkpoints.disk import Sum
from ppsf_dist.checkpoints.manifest import Manifest
from ppsf_dist.fsdp import load_checkpoint
from tests.checkpoints.small import DATA, EXTRA, FILES, METADATA, Pair, content, equal, fresh, saved, trained
from tests.test_state import same

FLIPS = 40
EVERY = (*(f"0/{name}" for name in FILES), "latest")


def refused(path: Path, pair: Pair, *, verify: bool = True) -> str:
    """The message with which a load is refused; nothing has changed after it."""
    before = content(pair)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, *pair, verify=verify)
    assert same(before, content(pair)), error.value
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved(tmp_path / "run", 3)
    return tmp_path / "run"


@pytest.mark.parametrize("name", EVERY)
def test_a_flipped_bit_is_found(name: str, path: Path) -> None:
    file, pair = path / name, fresh(1)
    whole = file.read_bytes()
    choose = random.Random(0)
    for _ in range(FLIPS):
        bits = bytearray(whole)
        bits[choose.randrange(len(bits))] ^= 1 << choose.randrange(8)
        if name == "latest" and bytes(bits).split() == whole.split():
            # One kind of white space for another says the same.
            continue
        file.write_bytes(bits)
        assert str(path) in refused(path, pair)
    file.write_bytes(whole)
    assert load_checkpoint(path, *pair) == {"step": 3}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_short_or_gone_is_found(name: str, verify: bool, path: Path) -> None:
    file, pair = path / "0" / name, fresh(1)
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 0):
        if verify or not (name == METADATA and length == len(whole) - 1):
            file.write_bytes(whole[:length])
            assert str(file) in refused(path, pair, verify=verify)
    file.unlink()
    assert str(file) in refused(path, pair, verify=verify)


@pytest.mark.parametrize("names", [(DATA,), (METADATA,), (EXTRA,), (DATA, METADATA), FILES], ids=str)
def test_files_of_another_save_are_found(names: tuple[str, ...], path: Path) -> None:
    """Of the same model and the same length, at a step of the same number of digits."""
    saved(path.parent / "other", 4, seed=0)
    for name in names:
        assert (path / "0" / name).read_bytes() != (path.parent / "other" / "0" / name).read_bytes()
        shutil.copy(path.parent / "other" / "0" / name, path / "0" / name)
    refused(path, fresh(1))


def test_the_switch_skips_the_checksums(path: Path) -> None:
    pair = fresh(1)
    (path / "0" / EXTRA).write_text('{"step": 5}')
    assert "extra.json has 11 bytes and not 11" not in refused(path, pair)
    assert load_checkpoint(path, *pair, verify=False) == {"step": 5}
    assert equal(pair, saved(path.parent / "again", 3))


def test_a_file_that_fails_in_the_middle_of_a_read_changes_nothing(path: Path) -> None:
    """Without checksums torch finds out when it comes to the tensor, after it has read the others."""
    file, pair = path / "0" / DATA, trained(1, seed=1)
    data = bytearray(file.read_bytes())
    last = data.rindex(b"PK\x05\x06")
    data[last : last + 4] = b"\0" * 4
    file.write_bytes(data)
    assert "cannot be read" in refused(path, pair, verify=False)


@pytest.mark.parametrize("text", ["[]", '"a"', "{"])
def test_extra_that_is_no_dictionary_is_refused(text: str, path: Path) -> None:
    (path / "0" / EXTRA).write_text(text)
    assert "extra.json" in refused(path, fresh(1), verify=False)


def test_a_manifest_of_a_later_release_says_so(path: Path) -> None:
    manifest = path / "0" / "ppsf_dist.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "format": 2}))
    assert "format 2" in refused(path, fresh(1), verify=False)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_each_file_is_checked_by_one_rank(ranks: int) -> None:
    manifest = Manifest("", {f"__{i}_0.distcp": Sum(i % 4, 0) for i in range(7)})
    shares = [manifest.share(rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(manifest.files)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
