"""What needs more than torch says what to install."""

from __future__ import annotations


def missing(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """The error to raise in place of one that says that a module of an extra is not there.

    Args:
        error: of the import. One that misses something else is returned as it is.
        extra: of this package; its first module has the same name.
    """
    if (error.name or "").partition(".")[0] != extra:
        return error
    return ModuleNotFoundError(f"{extra} is not installed: pip install 'ppsf-dist[{extra}]'", name=error.name)
