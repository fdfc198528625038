"""Put probes to trained models, and put together what they give over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from contextlab import registry
from contextlab.errors import InputError
from contextlab.evaluation.evaluate import _evaluating
from contextlab.evaluation.results import read_results, summarise, table, typed, write_results
from contextlab.inspect.probe import COLUMNS, Probe, Subject, parse_probe, records
from contextlab.models import Model
from contextlab.prompt import Task
from contextlab.prompt import task_name as name_of
from contextlab.spec import describe
from contextlab.words import listed

WHOSE = ("run", "model", "task", "seed", "probe")
ALL = (*WHOSE, *COLUMNS)
KEYS = ("run", "model", "task", "probe", "site", "layer", "head", "place", "at", "what", "measure")


class LeftOut(NamedTuple):
    """A probe that was not put to a model, and why."""

    probe: str
    model: str
    task: str
    why: str


@dataclass
class Looked:
    """What probes found.

    table: tidy, the columns `WHOSE` and those of `probe_table`; "probe" is its text, options included.
    left_out: the probes that were not put to a model.
    """

    table: pd.DataFrame
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """What it says, a sentence each; the model and the task are named where there are several."""
        return looked_words(self.table)

    @property
    def reasons(self) -> list[str]:
        """Why probes were left out, a line for all models that it is true of."""
        models: dict[tuple[str, str, str], list[str]] = {}
        for each in self.left_out:
            models.setdefault((each.probe, each.task, each.why), []).append(each.model)
        return [
            f"{probe} ({listed(list(dict.fromkeys(own)))}, {task}): {why}" for (probe, task, why), own in models.items()
        ]

    @staticmethod
    def join(parts: Sequence[Looked]) -> Looked:
        """Several as one."""
        tables = [each.table for each in parts if not each.table.empty]
        left_out = [each for part in parts for each in part.left_out]
        return Looked(pd.concat(tables, ignore_index=True) if tables else table([], ALL), left_out)


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
    who: dict[str, Any] = {"run": run, "model": name, "task": task_name or name_of(task), "seed": training_seed}
    tables, left_out = [], []
    with _evaluating(model):
        for text, probe in named.items():
            progress(text)
            try:
                if reason := probe.refusal(subject):
                    raise InputError(reason)
                found = probe.measure(subject)
            except InputError as error:
                left_out.append(LeftOut(text, name, who["task"], str(error)))
                if probes is not None and not skip:
                    raise InputError(f"probe {Looked(table([], ALL), left_out).reasons[-1]}") from None
                continue
            if list(found.columns) != list(COLUMNS):
                raise InputError(f"probe {text}: its table has other columns than those of probe_table")
            tables.append(typed(found.assign(**who, probe=text)[list(ALL)], ALL))
    return Looked(pd.concat(tables, ignore_index=True) if tables else table([], ALL), left_out)


def named_probes(probes: str | Iterable[str] | None) -> dict[str, Probe]:
    """Text -> probe; of all where none is named. Raises InputError."""
    texts = registry.names("probe") if probes is None else [probes] if isinstance(probes, str) else list(probes)
    if not texts:
        raise InputError("probes: expected one or more")
    return {text: parse_probe(text) for text in texts}


def write_looked(found: pd.DataFrame, path: str | Path) -> Path:
    """Write a table of `look` to a Parquet file, atomically."""
    return write_results(found, path, ALL)


def read_looked(paths: Iterable[str | Path]) -> pd.DataFrame:
    """Tables that `write_looked` wrote, as one. Raises InputError for files that are none."""
    return read_results(paths, ALL)


def over_seeds(found: pd.DataFrame) -> pd.DataFrame:
    """A table with its seeds put together, as `evaluation.summarise` does, and the mean of their controls.

    Adds the column `seeds`.
    """
    control = found.groupby(list(KEYS), dropna=False, sort=False, observed=True)["control"].mean()
    return summarise(found).assign(control=control.to_numpy())


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
