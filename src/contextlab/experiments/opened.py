"""Run: a run on disk, read."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from contextlab.errors import InputError, first_line, unknown
from contextlab.evaluation import Measured
from contextlab.evaluation.results import BY_PROMPT_COLUMNS, read_compressed, table
from contextlab.experiments.folder import OF_RUN, OF_TRAINING, RECORD, REPORT, RESULTS, RunFolder, read_run_record
from contextlab.experiments.made_with import naming_plugins
from contextlab.experiments.recipes import load_recipe
from contextlab.inspect.looking import read_looked
from contextlab.models import Model
from contextlab.prompt import Task
from contextlab.report import summary_table, summary_words
from contextlab.report.digest import Digest
from contextlab.report.naming import record_tasks
from contextlab.training.checkpoint import load, newest


@dataclass(frozen=True)
class Run:
    """A run on disk.

    folder: where it lies. results: all measurements. records: one dict a training.
    record: the run's own record (status, versions, machine). report: the HTML page.
    facets: errors by facets of the predictions. similarity: of models to learners. Empty where nothing was measured.
    compressed: what a model loses under policies; empty where the recipe does not ask.
    sweep: every trial's setting and score (see `trials_table.sweep_table`); empty where nothing is swept.
    by_prompt: the value of each prompt, by which differences are paired; empty in runs of older versions.
    inspected: what probes found inside the trained models; empty where the recipe does not ask.
    """

    folder: Path
    results: pd.DataFrame
    records: list[dict[str, Any]]
    record: dict[str, Any]
    facets: pd.DataFrame
    similarity: pd.DataFrame
    compressed: pd.DataFrame = field(default_factory=pd.DataFrame)
    sweep: pd.DataFrame = field(default_factory=pd.DataFrame)
    by_prompt: pd.DataFrame = field(default_factory=lambda: table([], BY_PROMPT_COLUMNS))
    inspected: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __repr__(self) -> str:
        status = [str(each["status"]) for each in self.records]
        ended = ", ".join(f"{status.count(each)} {each}" for each in dict.fromkeys(status))
        return f"Run({str(self.folder)!r}, {self.record['status']}; trainings: {ended or 'none'})"

    def _repr_html_(self) -> str:
        """In a notebook: the table of each task, what they say in words, and a link to the report."""
        digest = Digest(self.results)
        tables = [
            f"<b>{escape(task)}</b>{pd.DataFrame(rows).to_html(index=False, border=0)}"
            for task, rows in summary_table(self.results, self.records, digest=digest).items()
        ]
        found = summary_words(self.results, self.records, digest=digest)
        words = "".join(f"<li>{escape(each)}</li>" for each in found)
        link = f'<a href="{escape(str(self.report))}">report.html</a>'
        return f"<div>{escape(repr(self))} {link}{''.join(tables)}<ul>{words}</ul></div>"

    @property
    def report(self) -> Path:
        return self.folder / REPORT

    def task(self, name: str) -> Task:
        """A task of the run, by its name there. Raises InputError with the nearest name."""
        spec = load_recipe(RunFolder(self.folder).spec)
        if name not in spec.tasks:
            raise InputError(unknown("task of this run", name, spec.tasks))
        with naming_plugins(self.folder):
            return spec.build_task(name)

    def models(self, task: str) -> dict[str, Model]:
        """The models trained on a task, alone or among others, by name; ":seed" is added where there are several."""
        records = [r for r in self.records if task in record_tasks(r) and r["status"] == "finished"]
        several = len({r["seed"] for r in records}) > 1
        found = {}
        for record in records:
            last = newest(self.folder / "trainings" / record["key"])
            if last is not None:
                with naming_plugins(self.folder):
                    model = load(last)
                found[f"{record['model']}:{record['seed']}" if several else record["model"]] = model
        if not found:
            raise InputError(f"{self.folder}: no finished training of task {task!r} with a checkpoint")
        return found


def open_run(folder: str | Path) -> Run:
    """Read a run from disk. Raises InputError when the folder holds none, or none that has results."""
    at = RunFolder(folder)
    if not at.record.exists():
        raise InputError(f"{folder}: no run there (expected {RECORD} and {RESULTS})")
    record = read_run_record(at.record, OF_RUN)
    if not at.results.exists():
        raise InputError(f"{folder}: the run has no results yet (status: {record['status']}); go on with --resume")
    at.require_unchanged(record, ".parquet")
    records = [read_run_record(path, OF_TRAINING) for path in sorted(at.path.glob(f"trainings/*/{RECORD}"))]
    found = Measured.read([at.results])
    compressed = read_compressed(at.compressed) if at.compressed.exists() else pd.DataFrame()
    return Run(
        at.path,
        found.results,
        records,
        record,
        found.facets,
        found.similarity,
        compressed,
        read_sweep(at.sweep),
        found.by_prompt,
        read_looked([at.inspected]) if at.inspected.exists() else pd.DataFrame(),
    )


def read_sweep(path: Path) -> pd.DataFrame:
    """The table of a run's trials; empty where there is none. Raises InputError when the file is damaged."""
    if not path.exists():
        return pd.DataFrame()
    try:
        return pd.read_parquet(path, dtype_backend="pyarrow").convert_dtypes(dtype_backend="numpy_nullable")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged or not Parquet ({first_line(error)})") from None
