"""The plugins that a run was made with, named where something of theirs is not known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contextlab.errors import InputError
from contextlab.files import read_record
from contextlab.plugins import is_imported, plugin_options

DEEPEST = 4
"""Folders from a run's own to those of its checkpoints, both counted."""


@contextmanager
def naming_plugins(path: Path) -> Iterator[None]:
    """Add to an InputError which plugins are missing that the run was made with in which `path` lies."""
    try:
        yield
    except InputError as error:
        missing = [each for each in _recorded(path) if not is_imported(each)]
        if not missing:
            raise
        told = f"{error}; the run there was made with what is not given here: add{plugin_options(missing)}"
        raise InputError(told) from None


def _recorded(path: Path) -> list[str]:
    """What the record of the run tells in which a path lies; empty where it lies in none."""
    for folder in (path, *path.resolve().parents)[:DEEPEST]:
        if (folder / "experiment.yaml").is_file() and (folder / "record.json").is_file():
            try:
                return [str(each) for each in read_record(folder / "record.json", {}).get("plugins") or ()]
            except InputError:  # a damaged record is told of by whoever needs it
                return []
    return []
