"""What a conversion made, in a folder: our own form and, where it is wanted and can be, that of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contextlab.errors import InputError
from contextlab.files import atomic_folder, write_record
from contextlab.models import Model, ModelSpec, save_model
from contextlab.models.exports import THEIRS, check_exportable, save_transformers

Origin = bool | str | Path
"""Whether transformers' form is written, too; a checkpoint's folder says so, and its tokenizer is copied."""


def save_converted(
    model: Model, folder: str | Path, name: str, record: Mapping[str, Any], transformers: Origin = False
) -> Path:
    """Write a model, and the record of what was done as a file of this name, into a folder that is not there yet.

    transformers: see `Origin`; what transformers can hold is written into a folder `THEIRS` within, and the record's
        key "transformers" tells its architecture, or what stands in the way.
    """
    path = Path(folder)
    with atomic_folder(path) as temporary:
        save_model(model, temporary)
        told = dict(record)
        if transformers is not False:
            told["transformers"] = _theirs(model, temporary / THEIRS, None if transformers is True else transformers)
        write_record(temporary / name, told)
    return path


def check_writable(spec: ModelSpec) -> None:
    """Raises InputError where transformers cannot hold what is to come out, which then need not be made."""
    try:
        check_exportable(spec)
    except InputError as error:
        raise InputError(f"transformers: cannot hold what comes out: {error}; leave --transformers out") from None


def _theirs(model: Model, folder: Path, like: str | Path | None) -> dict[str, str]:
    try:
        return {"architecture": save_transformers(model, folder, like)}
    except InputError as error:
        return {"why_not": str(error)}
