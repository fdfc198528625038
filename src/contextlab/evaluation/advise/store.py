"""What was measured, kept in a folder: the next question reads what is there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from contextlab.errors import InputError
from contextlab.evaluation.results import COMPRESS_COLUMNS, read_compressed, table, write_results
from contextlab.files import own_folder, present, read_record, short, write_record

MEASURED, RECORD = "measured.parquet", "measured.json"


@dataclass
class Store:
    """Rows of `compress` and what they hold for.

    folder: None keeps nothing. holds_for: what is another where the text is another, name -> text. forms: label ->
    what its measurements depend on. rows: what was measured.
    """

    folder: Path | None
    holds_for: dict[str, str]
    forms: dict[str, str] = field(default_factory=dict)
    rows: pd.DataFrame = field(default_factory=lambda: table([], COMPRESS_COLUMNS))

    @classmethod
    def opened(cls, folder: Path | None, holds_for: dict[str, str], forms: dict[str, str]) -> Store:
        """What the folder holds for this model, these prompts and these forms.

        Raises InputError where it holds measurements of others.
        """
        made = cls(folder, holds_for, forms)
        if folder is None:
            return made
        own_folder(folder)
        if not present(folder / RECORD) or not present(folder / MEASURED):
            return made
        record = read_record(folder / RECORD, {"holds_for": dict, "forms": dict}, "choose another folder with --out")
        for name, now in holds_for.items():
            if record["holds_for"].get(name) != now:
                raise InputError(f"{short(folder)}: holds measurements of {name}; give another --out")
        for label, now in forms.items():
            if record["forms"].get(label, now) != now:
                raise InputError(
                    f"{short(folder)}: holds measurements of another {label!r} (of other weights, or calibrated on "
                    "other data); give another --out"
                )
        return dataclasses.replace(made, forms={**record["forms"], **forms}, rows=read_compressed(folder / MEASURED))

    def has(self, key: tuple[str, str, str, str], tasks: list[str], length: int) -> bool:
        """Whether a way is measured on all of the tasks at a length."""
        have = {task for *own, task, at in _keys(self.rows) if tuple(own) == key and at == length}
        return set(tasks) <= have

    def lengths(self) -> list[int]:
        """Lengths at which something was measured."""
        return [int(each) for each in self.rows["length"].dropna().unique()]

    def add(self, rows: pd.DataFrame) -> None:
        """Keep rows, and write them; of what is there already the first stay."""
        known = set(_keys(self.rows))
        fresh = [key not in known for key in _keys(rows)]
        new = rows[fresh]
        self.rows = new if self.rows.empty else pd.concat([self.rows, new], ignore_index=True)
        if self.folder is not None:
            write_results(self.rows, self.folder / MEASURED, COMPRESS_COLUMNS)
            write_record(self.folder / RECORD, {"holds_for": self.holds_for, "forms": self.forms})


def _keys(rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Of each row `weights`, "" for none, `model`, `split`, `kind`, `task` and `length`."""
    named = (rows[name].tolist() for name in ("model", "split", "kind", "task", "length"))
    return list(zip(rows["weights"].fillna("").tolist(), *named, strict=True))
