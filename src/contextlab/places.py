"""Where results are to go: refused before any work where they could not be written."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from contextlab.errors import InputError
from contextlab.files import plain_os_errors, present, short


def require_free(folder: str | Path) -> None:
    """Refuse a folder that is to be made where its name is taken, or nothing can be made there: before minutes of work.

    Raises InputError or ResourceError, and leaves nothing behind.
    """
    path = Path(folder)
    with plain_os_errors(path):
        if present(path) or path.is_symlink():
            raise InputError(f"{short(folder)}: is there already; remove it or choose another name")
    require_place(path.parent)


def require_place(folder: str | Path) -> None:
    """Refuse a folder, there or not, in which no file could be made: before minutes of work.

    Permissions do not tell it of every file system, so an empty folder is made there, and removed.

    Raises InputError or ResourceError, and leaves nothing behind.
    """
    path = Path(folder)
    with plain_os_errors(path):
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # raises for names that no file can have
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
        if not nearest.is_dir():
            where = "" if nearest == path else f"cannot be made there: {short(nearest)} "
            raise InputError(f"{short(folder)}: {where}is a file; expected a folder, or a name that is free")
        with tempfile.TemporaryDirectory(prefix=".contextlab.", dir=nearest):
            pass
