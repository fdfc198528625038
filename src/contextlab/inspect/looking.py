"""Put probes to trained models, and put together what they give over seeds."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from torch import nn

from contextlab import registry
from contextlab.errors import InputError, first_line
from contextlab.evaluation.evaluate import _evaluating
from contextlab.evaluation.intervals import t95
from contextlab.files import write_atomic
from contextlab.inspect.probe import COLUMNS, DTYPES, Probe, Subject, parse_probe, records
from contextlab.models import Model
from contextlab.prompt import Task
from contextlab.spec import describe

WHOSE = ("run", "model", "task", "seed", "probe")
ALL = (*WHOSE, *COLUMNS)
KEYS = ("run", "model", "task", "probe", "site", "layer", "head", "place", "at", "what", "measure")


@dataclass
class Looked:
    """What probes found.

    table: tidy, the columns `WHOSE` and those of `probe_table`; "probe" is its text, options included.
    left_out: why a probe was not put to a model, a line each.
    """

    table: pd.DataFrame
    left_out: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """What it says, a sentence each; the model and the task are named where there are several."""
        return looked_words(self.table)

    @staticmethod
    def join(parts: Sequence[Looked]) -> Looked:
        """Several as one; a reason that is of several models alike stands once."""
        tables = [each.table for each in parts if not each.table.empty]
        lines = dict.fromkeys(line for each in parts for line in each.left_out)
        return Looked(pd.concat(tables, ignore_index=True) if tables else _empty(), list(lines))


def look(
    model: nn.Module,
    task: Task,
    probes: str | Iterable[str] | None = None,
    *,
    seed: int = 0,
    name: str = "model",
    run: str = "",
    task_name: str | None = None,
    training_seed: int = 0,
    checkpoints: Mapping[int, Callable[[], Model]] | None = None,
    skip: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Looked:
    """Put probes to a trained model: what happens inside it, as tables and in words.

    model: of ours. task: whose prompts it reads, which it was trained on.
    probes: names with options, such as "heads" and "linear:what=weights"; None: all that apply, as they are.
    seed: of the prompts. training_seed, name, run, task_name: written into the table.
    checkpoints: step -> what loads the model as it was then, for probes of how the training went.
    skip: leave out a probe that is named and cannot be put to it, too, and tell.
    progress: told the probe that is at work.

    The model is read as one that is not in training, and is left as it was. Raises InputError where it does not read
    such prompts, and where a probe that is named cannot be put to it; of all probes such are left out and told.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"inspect: probes are put to models of our own stack, got {type(model).__name__}; "
            "contextlab.load(..., native=True) imports a checkpoint"
        )
    if not isinstance(task, Task):
        raise InputError(f"inspect: expected a task (contextlab.build_task makes one), got {describe(task)}")
    subject = Subject(model, task, seed, dict(checkpoints or {}), name)
    subject.require_fitting()
    named = named_probes(probes)
    who: dict[str, Any] = {"run": run, "model": name, "task": task_name or registered_name(task), "seed": training_seed}
    tables, left_out = [], []
    with _evaluating(model):
        for text, probe in named.items():
            progress(text)
            try:
                if reason := probe.refusal(subject):
                    raise InputError(reason)
                found = probe.measure(subject)
            except InputError as error:
                line = f"{text} ({name}, {who['task']}): {error}"
                if probes is not None and not skip:
                    raise InputError(f"probe {line}") from None
                left_out.append(line)
                continue
            if list(found.columns) != list(COLUMNS):
                raise InputError(f"probe {text}: its table has other columns than those of probe_table")
            tables.append(found.assign(**who, probe=text)[list(ALL)])
    return Looked(typed(pd.concat(tables, ignore_index=True)) if tables else _empty(), left_out)


def named_probes(probes: str | Iterable[str] | None) -> dict[str, Probe]:
    """Text -> probe; of all where none is named. Raises InputError."""
    texts = registry.names("probe") if probes is None else [probes] if isinstance(probes, str) else list(probes)
    if not texts:
        raise InputError("probes: expected one or more")
    return {text: parse_probe(text) for text in texts}


def registered_name(task: Task) -> str:
    """What a task is called."""
    entry = registry.entry_of("task", task)
    return type(task).__name__ if entry is None else entry.name


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the types of its columns."""
    return table.astype({**dict.fromkeys(("run", "model", "task", "probe"), "string"), "seed": "Int64", **DTYPES})


def write_looked(table: pd.DataFrame, path: str | Path) -> Path:
    """Write a table of `look` to a Parquet file, atomically."""
    buffer = io.BytesIO()
    typed(table[list(ALL)]).to_parquet(buffer, index=False)
    write_atomic(Path(path), buffer.getvalue())
    return Path(path)


def read_looked(paths: Iterable[str | Path]) -> pd.DataFrame:
    """Tables that `write_looked` wrote, as one. Raises InputError for files that are none."""
    tables = []
    for path in paths:
        try:
            found = pd.read_parquet(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged or not Parquet ({first_line(error)})") from None
        if lacking := [name for name in ALL if name not in found]:
            raise InputError(f"{path}: is no table of probes: it lacks the columns {', '.join(lacking)}")
        tables.append(typed(found[list(ALL)]))
    return pd.concat(tables, ignore_index=True) if tables else _empty()


def _empty() -> pd.DataFrame:
    return typed(pd.DataFrame(columns=list(ALL)))


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """A table with its seeds put together: the mean, and an interval that holds their spread, too.

    Of two seeds or more it is Student's t over the seeds' values, with the half-width over prompts added in quadrature
    (on the safe side, as `evaluation.summarise` is); of one it is that over prompts. Adds the column `seeds`.
    """
    halves = table.assign(half=(table["ci_high"] - table["ci_low"]) / 2)
    found = (
        halves.groupby(list(KEYS), dropna=False, sort=False, observed=True)
        .agg(
            value=("value", "mean"), ci_low=("ci_low", "first"), ci_high=("ci_high", "first"),
            control=("control", "mean"), n=("n", "min"), seeds=("value", "size"), spread=("value", "std"),
            half=("half", "mean"),
        )
        .reset_index()
    )  # fmt: skip
    t = np.array([t95(max(1, int(seeds) - 1)) for seeds in found["seeds"]])
    half = np.hypot(t * found["spread"].astype(float) / np.sqrt(found["seeds"].astype(float)), found["half"].fillna(0))
    several = found["seeds"] > 1
    for end, sign in (("ci_low", -1), ("ci_high", 1)):
        found[end] = found[end].where(~several, found["value"] + sign * half)
    return found.drop(columns=["spread", "half"])


def looked_words(table: pd.DataFrame) -> list[str]:
    """What the table of `look` says, probe by probe, model by model."""
    if table.empty:
        return []
    together = over_seeds(table)
    several = {key: together[key].nunique() > 1 for key in ("run", "task", "model")}
    sentences = []
    for (run, task, text, model), rows in together.groupby(["run", "task", "probe", "model"], sort=False):
        named = [str(value) for key, value in zip(("run", "task", "model"), (run, task, model), strict=True)
                 if several[key]]  # fmt: skip
        prefix = f"{', '.join(named)}: " if named else ""
        sentences += [prefix + sentence for sentence in parse_probe(str(text)).words(records(rows))]
    return sentences
