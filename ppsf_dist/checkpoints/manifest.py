"""The file by which a folder is known as a checkpoint of this package, and by which its other files are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppsf_dist.checkpoints.disk import Sum, open_file, replace, sum_of

MANIFEST = "ppsf_dist.json"
"""Its name is the mark: it is there before any data, and whole only after all of them."""

FORMAT = 1
"""Raised when an older release could not read it."""

ADVICE = "it is damaged: restore it from a copy, or load another checkpoint"


@dataclass(frozen=True)
class Manifest:
    """What a save has written.

    Args:
        save: name of the save, like no other.
        files: of the folder but this one, with their sums; none while the save is under way.
    """

    save: str
    files: Mapping[str, Sum] = field(default_factory=dict)

    def write(self, folder: Path) -> Sum:
        """Put it into a folder, in place of an earlier one; returns its own sum."""
        content = {"format": FORMAT, "save": self.save, "files": {name: s._asdict() for name, s in self.files.items()}}
        return replace(folder / MANIFEST, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of a later release.
        """
        path = folder / MANIFEST
        with open_file(path) as file:
            content = file.read()
        try:
            values: dict[str, Any] = json.loads(content)
            version = values["format"]
            files = {str(name): Sum(int(s["length"]), int(s["crc32"])) for name, s in values["files"].items()}
            manifest = cls(str(values["save"]), files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no list of files: {ADVICE}") from error
        if version != FORMAT:
            raise ValueError(f"{path} has format {version!r}, this release reads {FORMAT}: load it with a later one")
        return manifest

    def check(self, folder: Path, names: list[str]) -> None:
        """Compare files with what was written.

        Raises:
            FileNotFoundError: one of them is gone.
            ValueError: one of them is not what was written.
        """
        for name in names:
            expected, found = self.files[name], sum_of(folder / name)
            if found != expected:
                what = (
                    f"has {found.length} bytes and not {expected.length}"
                    if found.length != expected.length
                    else f"has the checksum {found.crc32:08x} and not {expected.crc32:08x}"
                )
                raise ValueError(f"{folder / name} {what}, which the save has written: {ADVICE}")

    def share(self, position: int, count: int) -> list[str]:
        """The files that one of so many ranks checks: each file is checked by one, the large ones dealt out first."""
        by_size = sorted(self.files, key=lambda name: (-self.files[name].length, name))
        return by_size[position::count]
