"""`measure`: what a run keeps of a predictor: from one pass over the prompts errors, facets, similarity; and regret."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from contextlab.errors import ContextlabError, InputError
from contextlab.evaluation.breakdown import FacetTally
from contextlab.evaluation.comparisons import compare_predictions
from contextlab.evaluation.decisions import ONLINE, regret
from contextlab.evaluation.evaluate import evaluate, evaluate_learners
from contextlab.evaluation.results import (
    BY_PROMPT_COLUMNS,
    COLUMNS,
    FACET_COLUMNS,
    SIMILARITY_COLUMNS,
    read_results,
    table,
    typed,
    write_results,
)
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.prompt import Predictor, Prompt, Task
from contextlab.tasks.decisions import DecisionTask

MOST_TOKENS = 16_384
"""Tokens of the prompts on which models are compared with learners: some learners take seconds for more."""
TABLES = {"facets": FACET_COLUMNS, "similarity": SIMILARITY_COLUMNS, "by_prompt": BY_PROMPT_COLUMNS}
"""Tables that lie beside the results, by name."""


@dataclass(frozen=True)
class Measured:
    """What was measured, as tidy tables.

    results: see `results.COLUMNS`; of decision tasks, "online" is one of the splits.
    facets: errors by facets of the task (`FACET_COLUMNS`), such as the distance of the fact.
    similarity: of models' predictions to those of each learner (`SIMILARITY_COLUMNS`).
    by_prompt: a row a predictor, split and metric: the value of each prompt, by which differences are paired
        (`BY_PROMPT_COLUMNS`).
    """

    results: pd.DataFrame
    facets: pd.DataFrame = field(default_factory=lambda: table([], FACET_COLUMNS))
    similarity: pd.DataFrame = field(default_factory=lambda: table([], SIMILARITY_COLUMNS))
    by_prompt: pd.DataFrame = field(default_factory=lambda: table([], BY_PROMPT_COLUMNS))

    def write(self, path: Path) -> None:
        """Write the results to `path`, and each other table that has rows beside it (see `beside`)."""
        for name, columns in TABLES.items():
            rows = getattr(self, name)
            if len(rows):
                write_results(rows, beside(path, name), columns)
            else:
                beside(path, name).unlink(missing_ok=True)
        write_results(self.results, path)  # last: where it lies, the job was done

    @staticmethod
    def read(paths: list[Path]) -> Measured:
        """Read and join what was written."""
        found = {}
        for name, columns in TABLES.items():
            there = [each for path in paths if (each := beside(path, name)).exists()]
            found[name] = read_results(there, columns) if there else table([], columns)
        return Measured(read_results(paths, COLUMNS), **found)

    @staticmethod
    def join(parts: list[Measured]) -> Measured:
        """The tables of several, one after another."""
        return Measured(*(_joined([getattr(part, name) for part in parts]) for name in ("results", *TABLES)))


def beside(path: Path, name: str) -> Path:
    """results.parquet -> facets.parquet; any other name, recall.parquet -> recall.facets.parquet."""
    return path.with_name(f"{name}.parquet" if path.stem == "results" else f"{path.stem}.{name}.parquet")


def measure(
    predictor: Predictor,
    task: Task,
    spec: EvaluateSpec,
    *,
    name: str = "model",
    run: str = "",
    seed: int = 0,
    task_name: str | None = None,
    device: torch.device | str | None = None,
    apart: Callable[[Prompt], Prompt] | None = None,
) -> Measured:
    """Measure a model: `evaluate`, and from the same predictions errors by facet and similarity to the learners.

    The similarity is that of the first prompts of the train split, `spec.similarity` of them at most, to each learner
    where the task has several. A decision task is also played online (see `regret`). Arguments are those of `evaluate`.
    """
    facets: dict[tuple[str, str], FacetTally] = {}
    answers = _Answers(spec, task)

    def watch(name: str, split: str, task: Task, prompt: Prompt, prediction: Tensor, errors: dict[str, Tensor]) -> None:
        facets.setdefault((name, split), FacetTally()).add(task, prompt, errors)
        answers.add(split, prompt, prediction)

    who = {"run": run, "seed": seed, "task": task_name or type(task).__name__}
    by_prompt: list[dict[str, Any]] = []
    results = evaluate(
        predictor,
        task,
        spec,
        name=name,
        kind="model",
        run=run,
        seed=seed,
        task_name=task_name,
        device=device,
        watch=watch,
        apart=apart,
        by_prompt=by_prompt,
    )
    failed = set(results.loc[results["n"] == 0, "split"])
    kept = {key: tally for key, tally in facets.items() if key[1] not in failed}
    alike = [] if "train" in failed else answers.compared()
    played = _play({name: predictor}, task, spec, run, task_name, device, by_prompt)
    return Measured(
        _joined([results, played.assign(kind="model", seed=seed)]),
        _facet_table(kept, {**who, "kind": "model"}),
        table(({**who, "model": name, **row} for row in alike), SIMILARITY_COLUMNS),
        table(({**row, "kind": "model", "seed": seed} for row in by_prompt), BY_PROMPT_COLUMNS),
    )


def measure_learners(task: Task, spec: EvaluateSpec, *, run: str = "", task_name: str | None = None) -> Measured:
    """Measure the task's learners: `evaluate_learners`, errors by facet, and regret in a decision task."""
    facets: dict[tuple[str, str], FacetTally] = {}

    def watch(name: str, split: str, task: Task, prompt: Prompt, prediction: Tensor, errors: dict[str, Tensor]) -> None:
        facets.setdefault((name, split), FacetTally()).add(task, prompt, errors)

    by_prompt: list[dict[str, Any]] = []
    results = evaluate_learners(task, spec, run=run, task_name=task_name, watch=watch, by_prompt=by_prompt)
    who = {"run": run, "seed": 0, "task": task_name or type(task).__name__, "kind": "learner"}
    chosen = {name: each for name, each in task.learners().items() if spec.learners is None or name in spec.learners}
    played = _play(chosen, task, spec, run, task_name, "cpu", by_prompt)
    return Measured(
        _joined([results, played]),
        _facet_table(facets, who),
        by_prompt=table(by_prompt, BY_PROMPT_COLUMNS),
    )


class _Answers:
    """The first predictions on the train split, to be compared with those of the learners."""

    def __init__(self, spec: EvaluateSpec, task: Task) -> None:
        self.task, self.left = task, spec.similarity
        learners = task.learners()
        self.learners = {name: learners[name] for name in spec.learners or learners if name in learners}
        self.prompts: list[Prompt] = []
        self.predictions: list[Tensor] = []

    def add(self, split: str, prompt: Prompt, prediction: Tensor) -> None:
        if split != "train" or len(self.learners) < 2:  # what is alike to the only learner tells no more than its error
            return
        taken = sum(each.batch for each in self.prompts)
        count = min(prompt.batch, min(self.left, MOST_TOKENS // prompt.length) - taken)
        if count > 0:
            self.prompts.append(prompt.rows(0, count))
            self.predictions.append(prediction[:count])

    def compared(self) -> list[dict[str, Any]]:
        if sum(each.batch for each in self.prompts) < 2:
            return []
        try:
            with torch.no_grad():
                rows = compare_predictions(self.predictions, self.learners, self.task, self.prompts)
        except InputError:  # every learner is perfect: nothing is told
            return []
        return [{"split": "train", **row} for row in rows if row["shot"] is None]


def _play(
    named: Mapping[str, Predictor],
    task: Task,
    spec: EvaluateSpec,
    run: str,
    task_name: str | None,
    device: torch.device | str | None,
    by_prompt: list[dict[str, Any]],
) -> pd.DataFrame:
    """Rows of online play, and of each problem's regret in `by_prompt`.

    Of a predictor that cannot play there is one row without a value, and a warning says why.
    """
    if not isinstance(task, DecisionTask) or not spec.rollouts or not named:
        return table([])
    parts = []
    for name, predictor in named.items():
        try:
            parts.append(
                regret(
                    {name: predictor},
                    task,
                    problems=spec.rollouts,
                    seed=spec.seed,
                    run=run,
                    task_name=task_name,
                    device=device,
                    by_problem=by_prompt,
                )
            )
        except ContextlabError as error:
            warnings.warn(f"{name} cannot play online: {error}", stacklevel=3)
            who = {"run": run, "model": name, "kind": "model" if isinstance(predictor, nn.Module) else "learner"}
            unplayed = {**who, "seed": 0, "task": task_name or type(task).__name__, "split": ONLINE, "n": 0}
            parts.append(table([{**unplayed, "metric": "regret", "length": task.horizon}]))
    return _joined(parts)


def _facet_table(facets: Mapping[tuple[str, str], FacetTally], who: Mapping[str, Any]) -> pd.DataFrame:
    return table(
        (
            {**who, "model": name, "split": split, **row}
            for (name, split), tally in facets.items()
            for row in tally.rows()
        ),
        FACET_COLUMNS,
    )


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables one after another; pandas asks that empty ones be left out, and below 3 loses the types of columns."""
    return typed(pd.concat([each for each in tables if len(each)] or tables[:1], ignore_index=True), tables[0].columns)
