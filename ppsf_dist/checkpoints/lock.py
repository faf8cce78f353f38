"""One job at a time writes into a folder: a lock that the kernel drops with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

LOCK = "lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that have none."""

MOST = 8
"""Folders that a process holds at a time, so that one who saves each time into a new one does not run out of files."""

_logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}
"""Descriptors, those used last at the end."""


def hold(root: Path) -> None:
    """Keep other processes from writing into a folder, until this one ends. Nothing happens if it does so already.

    Whatever ends the process, ``kill -9`` included, ends the lock, and so does writing into ``MOST`` other folders. On
    a file system without locks only a warning is logged.

    Raises:
        RuntimeError: another process holds the folder.
    """
    root = root.resolve()
    path = root / LOCK
    held = _held.pop(root, None)
    if held is not None:
        if _lies_at(held, path):
            _held[root] = held
            return
        # The folder was removed and made anew.
        os.close(held)
    while (descriptor := _lock(path)) is not None:
        if _lies_at(descriptor, path):
            break
        os.close(descriptor)
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {started}".encode(), 0)
        while len(_held) >= MOST:
            let_go(next(iter(_held)))
        _held[root] = descriptor


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock, or None where there are no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        os.close(descriptor)
        raise RuntimeError(
            f"path is {path.parent}, where another job saves ({holder}): give this one a path of its own, or end the "
            f"other one. If that host is gone for good, remove {path}"
        ) from error
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _NO_LOCKS:
            raise
        _logger.warning("%s cannot be locked (%s): see that no other job saves there", path.parent, error)
        return None


def _lies_at(descriptor: int, path: Path) -> bool:
    """Whether a file still has the name under which it was opened."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def let_go(root: Path | None = None) -> None:
    """Let other processes write into a folder, or into every one that this process holds."""
    for held in [root.resolve()] if root is not None else list(_held):
        if held in _held:
            os.close(_held.pop(held))


# A fork, such as a worker that loads data, must not keep the lock of a process that is gone.
os.register_at_fork(after_in_child=let_go)
