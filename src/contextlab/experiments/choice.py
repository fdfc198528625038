"""Which trial of a sweep is the best, by validation prompts alone, and all that a run tells of its trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from contextlab.evaluation.results import summarise, table
from contextlab.experiments.jobs import Job, Training
from contextlab.experiments.spec import ExperimentSpec

NEAR = 0.95
"""The window of a field is where the quality is at least this share of the best."""
NO_SCORE = "no score"
"""The status of a seed whose training finished, but whose score is no number."""
NUMBERS = ("value", "ci_low", "ci_high")

Records = Callable[[Job], Mapping[str, Any]]
"""The record of a trial's job; empty where it has not ended."""


@dataclass(frozen=True)
class Tried:
    """A trial of a model on a task, all seeds together.

    number, setting: of the trial. statuses: of each seed. stopped: why the training of each ended before its last step,
        "solved" or "hopeless"; "" where it did not. value: the mean over the seeds that finished, and over tasks
        where it was trained on several; nan where none did. ci_low, ci_high: its 95% interval.
    """

    number: int
    setting: Mapping[str, Any]
    statuses: Sequence[str]
    value: float
    ci_low: float
    ci_high: float
    stopped: Sequence[str] = ()

    @property
    def missing(self) -> int:
        """Seeds that did not finish, or whose score is no number."""
        return sum(status != "finished" for status in self.statuses)


def trials(spec: ExperimentSpec, job: Job, records: Records) -> list[Tried]:
    """The trials of the model and task of a job of kind "training", in order."""
    by_number: dict[int, list[Training]] = {}
    for seed in spec.seeds:
        for training in spec.candidates(Job("training", job.task, job.model, seed)):
            assert training.trial is not None
            by_number.setdefault(training.trial, []).append(training)
    rows, statuses, stopped = [], {}, {}
    for number, trainings in by_number.items():
        ended = [records(training.job) for training in trainings]
        statuses[number] = [_status(each) for each in ended]
        stopped[number] = [str(each.get("stopped", "")) for each in ended]
        for training, each in zip(trainings, ended, strict=True):
            rows += [
                {"split": str(number), "seed": training.seed, "task": task, "metric": score["metric"], "n": score["n"],
                 **{name: math.nan if score[name] is None else score[name] for name in NUMBERS}}
                for task, score in (each.get("validation") or {}).items()
                if _status(each) == "finished"
            ]  # fmt: skip
    means: dict[str, list[float]] = {}
    if rows:
        over_tasks = summarise(table(rows)).groupby("split")[list(NUMBERS)].mean()
        means = {str(row[0]): [float(each) for each in row[1:]] for row in over_tasks.itertuples()}
    found = []
    for number, members in by_number.items():
        value, low, high = means.get(str(number), [math.nan] * len(NUMBERS))
        found.append(Tried(number, members[0].setting, statuses[number], value, low, high, stopped[number]))
    return found


def _status(record: Mapping[str, Any]) -> str:
    """How a trial ended from one seed; one whose score on a task is no number has no mean to be compared."""
    status = str(record.get("status", "missing"))
    scores = (record.get("validation") or {}).values()
    return NO_SCORE if status == "finished" and any(score["value"] is None for score in scores) else status


def best(tried: Iterable[Tried], higher_is_better: bool) -> Tried:
    """That with the fewest seeds that did not finish; of these, that of the best mean; of equals, the first."""
    sign = -1.0 if higher_is_better else 1.0
    return min(
        tried, key=lambda each: (each.missing, sign * each.value if not math.isnan(each.value) else 0, each.number)
    )


def window(tried: Sequence[Tried], path: str, higher_is_better: bool) -> tuple[float, float] | None:
    """From where to where a field's values are within 95% of the best, around the best value.

    At each value the best over the other fields counts. A larger quality q is within it where q >= 0.95 best, an error
    where 0.95 error <= best. None where values are no numbers, or where fewer than two of them were tried.
    """
    curve = profile(tried, path, higher_is_better)
    if len(curve) < 2:
        return None
    values = list(curve)
    quality = list(curve.values())
    top = quality.index(max(quality) if higher_is_better else min(quality))
    near = [q >= NEAR * quality[top] if higher_is_better else NEAR * q <= quality[top] for q in quality]
    low = high = top
    while low > 0 and near[low - 1]:
        low -= 1
    while high + 1 < len(near) and near[high + 1]:
        high += 1
    return values[low], values[high]


def profile(tried: Sequence[Tried], path: str, higher_is_better: bool) -> dict[float, float]:
    """A numeric field's values, in order -> the best mean among the trials that have it; those with a number only."""
    found: dict[float, float] = {}
    for each in tried:
        value = each.setting.get(path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if each.missing == 0:
            better = max if higher_is_better else min
            found[value] = better(found.get(value, each.value), each.value)
    return dict(sorted(found.items()))


def told(spec: ExperimentSpec, job: Job, records: Records) -> dict[str, Any]:
    """What the record of a measured model says of its sweep: `trial`, `setting`, what is `tied` to it, and in `sweep`
    every trial's score."""
    training = spec.candidates(job)[0]
    task = next(iter(training.tasks.values()))
    tried = trials(spec, job, records)
    chosen = best(tried, task.higher_is_better)
    return {
        "trial": chosen.number,
        "setting": dict(chosen.setting),
        "tied": dict(spec.sweep_of(job.model).ties(chosen.setting)),
        "sweep": {
            "trials": len(tried),
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "validation": _validated(spec, job),
            "windows": {
                path: list(found)
                for path in chosen.setting
                if (found := window(tried, path, task.higher_is_better)) is not None
            },
            "tied": {path: tie.model_dump() for path, tie in spec.sweep_of(job.model).tied.items()},
            "curve": [
                {
                    "trial": each.number,
                    "setting": dict(each.setting),
                    "statuses": list(each.statuses),
                    "stopped": list(each.stopped),
                    **{name: None if math.isnan(value := getattr(each, name)) else value for name in NUMBERS},
                }
                for each in tried
            ],
        },
    }


def sweep_table(spec: ExperimentSpec, records: Records, chosen: Mapping[Job, int]) -> pd.DataFrame:
    """Every trial as a tidy table: a row for each seed and task that it was scored on, with a column for each field.

    chosen: of each measured job the number of the trial that it has.

    Columns: run, task, model, seed, trial, status, stopped ("solved" or "hopeless" where the training ended before its
    last step), steps, seconds, metric, value, ci_low, ci_high, n, chosen, and one for each path, swept or tied. A trial
    that gave no score has one row without a value.
    """
    rows = []
    for training in spec.trainings():
        if training.trial is None:
            continue
        record = records(training.job)
        setting = {**training.setting, **spec.sweep_of(training.model_name).ties(training.setting)}
        who = {
            "run": spec.name,
            "model": training.model_name,
            "seed": training.seed,
            "trial": training.trial,
            "status": record.get("status", "missing"),
            "stopped": record.get("stopped", ""),
            "steps": record.get("steps"),
            "seconds": record.get("seconds"),
            "chosen": chosen.get(training.measured) == training.trial,
        }
        for name, task in training.tasks.items():
            score = (record.get("validation") or {}).get(name, {})
            own = {key: score.get(key) for key in (*NUMBERS, "n")}
            rows.append({**who, "task": name, "metric": task.metric, **own, **setting})
    found = pd.DataFrame(rows)
    paths = [name for name in found if "." in str(name)]
    for path in paths:
        if not pd.api.types.is_numeric_dtype(found[path]):
            found[path] = found[path].map(lambda value: None if _absent(value) else str(value)).astype("string")
    order = [
        "run",
        "task",
        "model",
        "seed",
        "trial",
        *paths,
        "status",
        "stopped",
        "steps",
        "seconds",
        "metric",
        *NUMBERS,
        "n",
        "chosen",
    ]
    text = dict.fromkeys(("run", "task", "model", "status", "stopped", "metric"), "string")
    numbers = {
        **dict.fromkeys(("seed", "trial", "steps", "n"), "Int64"),
        **dict.fromkeys((*NUMBERS, "seconds"), "float64"),
    }
    return found[order].astype({**text, **numbers})


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _validated(spec: ExperimentSpec, job: Job) -> dict[str, Any]:
    return spec.sweep_of(job.model).validation.model_dump(mode="json")
