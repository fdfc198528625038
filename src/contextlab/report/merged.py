"""Several runs in one report: what is told side by side must be comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation import Measured
from contextlab.report.naming import and_so_on, record_label, record_tasks
from contextlab.words import flat


def told_apart(
    names: Sequence[str],
    measured: Sequence[Measured],
    records: Sequence[Sequence[Mapping[str, Any]]],
    specs: Sequence[Mapping[str, Any]],
) -> tuple[list[Measured], list[list[dict[str, Any]]], list[str]]:
    """The runs' tables and records, with a task's name extended by the run's where it is another task in each.

    A task is the same in two runs where its options are, and, where the values by prompt are known, its prompts on
    "train". names: of the runs. measured, records, specs: of each run, as it lies on disk.

    Returns the tables and the records, and a sentence for each task that was told apart and why.
    """
    tables = list(measured)
    changed = [[dict(record) for record in own] for own in records]
    words = []
    tasks = list(dict.fromkeys(task for spec in specs for task in spec.get("tasks", {})))
    for task in tasks:
        among = [i for i, spec in enumerate(specs) if task in spec.get("tasks", {})]
        first, *others = among
        why = [reason for i in others if (reason := _differs(task, specs[first], specs[i], tables[first], tables[i]))]
        if not why:
            continue
        words.append(
            f"{task} is not the same in {and_so_on([names[i] for i in among])} ({why[0]}): told apart, not compared."
        )
        for i in among:
            new = f"{task} in {names[i]}"
            tables[i] = Measured(*(_renamed(each, task, new) for each in vars(tables[i]).values()))
            for record in changed[i]:
                if record.get("task") == task:
                    record["task"] = new
                if "tasks" in record:
                    record["tasks"] = [new if each == task else each for each in record["tasks"]]
    return tables, changed, words


def _differs(
    task: str, one: Mapping[str, Any], two: Mapping[str, Any], first: Measured, second: Measured
) -> str | None:
    """In what a task differs between two runs."""
    options = []
    for spec in (one, two):
        entry = spec["tasks"][task]
        options.append(dict(flat({key: entry.get(key) for key in ("task", "preset", "options")})))
    for key in dict.fromkeys([*options[0], *options[1]]):
        own, other = (each.get(key, "the default") for each in options)
        if own != other:
            return f"{key.removeprefix('options.')}: {own} and {other}"
    drawn = [_prompts(each.by_prompt, task) for each in (first, second)]
    if all(drawn) and not drawn[0] & drawn[1]:
        return "other prompts"
    return None


def _prompts(by_prompt: pd.DataFrame, task: str) -> set[str]:
    """The prompts on which a task was measured."""
    rows = by_prompt[(by_prompt["task"] == task) & (by_prompt["split"] == "train")]
    return set(rows["prompts"].dropna().astype(str))


def _renamed(rows: pd.DataFrame, task: str, new: str) -> pd.DataFrame:
    return rows.assign(task=rows["task"].mask(rows["task"] == task, new).astype("string"))


def differing_trainings(records: Sequence[Mapping[str, Any]], task: str) -> dict[str, dict[str, str]]:
    """Label of a model, as `record_label` gives it -> its steps and seeds, where these differ among a task's models."""
    several = len({record.get("run") for record in records}) > 1
    steps: dict[str, set[int]] = {}
    seeds: dict[str, set[int]] = {}
    for record in records:
        if task in record_tasks(record) and record.get("status") == "finished":
            name = record_label(record, several)
            steps.setdefault(name, set()).add(int(record.get("steps", 0)))
            seeds.setdefault(name, set()).add(int(record["seed"]))
    told: dict[str, dict[str, str]] = {name: {} for name in steps}
    for title, each in (
        ("steps", {name: " to ".join(f"{s:,}" for s in sorted({min(v), max(v)})) for name, v in steps.items()}),
        ("seeds", {name: str(len(v)) for name, v in seeds.items()}),
    ):
        if len(set(each.values())) > 1:
            for name, value in each.items():
                told[name][title] = value
    return told
