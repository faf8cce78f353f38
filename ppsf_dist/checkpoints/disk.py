"""Files that are new, on disk and summed when they are closed; no function here follows a symbolic link."""

from __future__ import annotations

import errno
import io
import os
import stat
import zlib
from pathlib import Path
from typing import IO, NamedTuple

from typing_extensions import Buffer

CHUNK_BYTES = 1 << 20


class Sum(NamedTuple):
    """What a file must be: its length, and its CRC-32, which costs a third of what torch takes to load the bytes."""

    length: int
    crc32: int


class SummingWriter(io.BufferedWriter):
    """A new file, written from its beginning to its end, that knows its sum and is on disk once it is closed.

    Args:
        path: must not exist, not even as a link.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "x"))
        self.sum = Sum(0, 0)

    def write(self, data: Buffer, /) -> int:
        written = super().write(data)
        self.sum = Sum(self.sum.length + written, zlib.crc32(data, self.sum.crc32))
        return written

    def close(self) -> None:
        if not self.closed:
            try:
                self.flush()
                os.fsync(self.fileno())
            finally:
                super().close()


def write_new(path: Path, content: bytes) -> Sum:
    """Write a file that must not exist, and wait until it is on disk."""
    with SummingWriter(path) as file:
        file.write(content)
    return file.sum


def replace(path: Path, content: bytes) -> Sum:
    """Write a file in place of the one that may be there: whoever looks finds one or the other, whole."""
    new = path.with_name(path.name + ".new")
    # Left by a writer that was killed.
    new.unlink(missing_ok=True)
    result = write_new(new, content)
    os.replace(new, path)
    sync_folder(path.parent)
    return result


def sync_folder(path: Path) -> None:
    """Wait until a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # File systems that keep no such list of their own.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def open_file(path: Path) -> IO[bytes]:
    """Open a plain file for reading.

    Raises:
        ValueError: it is a link, a folder, a pipe, ...
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError(f"{path} is no plain file: nothing else is read in a checkpoint. Put the file itself there")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


def sum_of(path: Path) -> Sum:
    """Read a file and sum it."""
    length = crc = 0
    chunk = bytearray(CHUNK_BYTES)
    view = memoryview(chunk)
    with open_file(path) as file:
        while count := file.readinto(chunk):  # type: ignore[attr-defined]
            length, crc = length + count, zlib.crc32(view[:count], crc)
    return Sum(length, crc)


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that name, and not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
