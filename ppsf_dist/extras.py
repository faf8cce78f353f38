"""What needs more than torch says what to install."""

from __future__ import annotations

from collections.abc import Sequence


def missing(error: ModuleNotFoundError, extra: str, modules: Sequence[str] = ()) -> ModuleNotFoundError:
    """The error to raise in place of one that says that a module of an extra is not there.

    Args:
        error: of the import. One that misses something else is returned as it is.
        extra: of this package.
        modules: what it brings; by default one by its name.
    """
    module = (error.name or "").partition(".")[0]
    if module not in (modules or (extra,)):
        return error
    return ModuleNotFoundError(f"{module} is not installed: pip install 'ppsf-dist[{extra}]'", name=error.name)
