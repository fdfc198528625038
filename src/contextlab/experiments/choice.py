"""Which trial of a sweep is the best, by validation prompts alone, and all that a run tells of its trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from contextlab.evaluation.results import summarise, table
from contextlab.experiments.halving import Race
from contextlab.experiments.jobs import Job, Training
from contextlab.experiments.rungs import (
    HOPELESS,
    PAUSED,
    Scores,
    deciding,
    higher_is_better,
    hopeless_at,
    in_force,
    mean_of,
    race_of,
    scored_at,
    standing,
    task_of,
)
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
    """A trial of a model on a task, all seeds together that decide.

    number, setting: of the trial. statuses: of each seed. stopped: why the training of each ended before its last step,
        "solved" or "hopeless"; "" where it did not. value: the mean over the seeds that finished, and over tasks
        where it was trained on several; nan where none did. ci_low, ci_high: its 95% interval.
    lost: seeds without a score where it counts, at the end or at a rung; None takes those that did not finish.
    """

    number: int
    setting: Mapping[str, Any]
    statuses: Sequence[str]
    value: float
    ci_low: float
    ci_high: float
    stopped: Sequence[str] = ()
    lost: int | None = None

    @property
    def missing(self) -> int:
        """Seeds that did not finish, or whose score is no number."""
        return sum(status != "finished" for status in self.statuses) if self.lost is None else self.lost

    @property
    def hopeless(self) -> int:
        """Seeds whose training finished before its last step, as hopeless."""
        pairs = zip(self.statuses, self.stopped, strict=False)  # nothing may be known of why they stopped
        return sum(status == "finished" and why == HOPELESS for status, why in pairs)


def trials(spec: ExperimentSpec, job: Job, records: Records, numbers: Iterable[int] | None = None) -> list[Tried]:
    """The trials of the model and task of a job of kind "training", in order, by their scores at their ends.

    numbers: of those that are wanted; None: all.
    """
    members = deciding(spec, job, numbers)
    ended = {number: [records(training.job) for training in each] for number, each in members.items()}
    statuses = {number: [_status(record) for record in each] for number, each in ended.items()}
    scores = {
        number: [record.get("validation") if _status(record) == "finished" else None for record in each]
        for number, each in ended.items()
    }
    return _tried(members, ended, statuses, scores)


def at_rung(spec: ExperimentSpec, job: Job, records: Records, race: Race, rung: int) -> list[Tried]:
    """The same by their scores at a rung, and how they stand in the race by now."""
    members = deciding(spec, job)
    ended = {number: [records(training.job) for training in each] for number, each in members.items()}
    statuses = {n: [standing(race, n, _status(record)) for record in each] for n, each in ended.items()}
    scores = {number: [scored_at(record, rung) for record in each] for number, each in ended.items()}
    return _tried(members, ended, statuses, scores)


def _tried(
    members: Mapping[int, Sequence[Training]],
    ended: Mapping[int, Sequence[Mapping[str, Any]]],
    statuses: Mapping[int, Sequence[str]],
    scores: Mapping[int, Sequence[Scores | None]],
) -> list[Tried]:
    """Trials with the means and intervals of their scores. ended: the records. scores: None where a seed gave none."""
    rows = [
        {"split": str(number), "seed": training.seed, "task": task, "metric": score["metric"], "n": score["n"],
         **{name: math.nan if score[name] is None else score[name] for name in NUMBERS}}
        for number, trainings in members.items()
        for training, found in zip(trainings, scores[number], strict=True)
        for task, score in (found or {}).items()
    ]  # fmt: skip
    means: dict[str, list[float]] = {}
    if rows:
        over_tasks = summarise(table(rows)).groupby("split")[list(NUMBERS)].mean()
        means = {str(row[0]): [float(each) for each in row[1:]] for row in over_tasks.itertuples()}
    found = []
    for number, trainings in members.items():
        value, low, high = means.get(str(number), [math.nan] * len(NUMBERS))
        lost = sum(each is None for each in scores[number])
        stopped = [str(record.get("stopped", "")) for record in ended[number]]
        found.append(Tried(number, trainings[0].setting, statuses[number], value, low, high, stopped, lost))
    return found


def _status(record: Mapping[str, Any]) -> str:
    """How a trial ended from one seed; one whose score on a task is no number has no mean to be compared."""
    status = str(record.get("status", "missing"))
    scores = (record.get("validation") or {}).values()
    return NO_SCORE if status == "finished" and any(score["value"] is None for score in scores) else status


def best(tried: Iterable[Tried], higher_is_better: bool) -> Tried:
    """That with the fewest seeds that did not finish, or ended as hopeless; of these, with the fewest that did not
    finish; of these, that of the best mean; of equals, the first."""
    sign = -1.0 if higher_is_better else 1.0

    def place(each: Tried) -> tuple[int, int, float, int]:
        value = 0.0 if math.isnan(each.value) else sign * each.value
        return each.missing + each.hopeless, each.missing, value, each.number

    return min(tried, key=place)


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
    every trial's score.

    With halving the scores are those at the last rung at which all trials can be compared, which `sweep.halving` names.
    """
    records = cache(records)  # each is asked for more than once
    task, halving = task_of(spec, job), spec.halving_of(job.model)
    metric, better = task.metric, task.higher_is_better
    tried = trials(spec, job, records)
    extra: dict[str, Any] = {}
    chosen = best(tried, better)
    if halving is not None:
        race = race_of(spec, job, records)
        chosen = best([each for each in tried if each.number in race.left], better)
        if (level := race.level) is not None:
            tried = at_rung(spec, job, records, race, level)
            metric, better = halving.metric or metric, higher_is_better(halving, task)
        extra = {"halving": _of_halving(spec, job, records, race)}
    return {
        "trial": chosen.number,
        "setting": dict(chosen.setting),
        "tied": dict(spec.sweep_of(job.model).ties(chosen.setting)),
        "sweep": {
            "trials": len(tried),
            "metric": metric,
            "higher_is_better": better,
            "validation": validation_of(spec, job.model),
            "windows": {
                path: list(found) for path in chosen.setting if (found := window(tried, path, better)) is not None
            },
            "tied": {path: tie.model_dump() for path, tie in spec.sweep_of(job.model).tied.items()},
            "curve": [
                {
                    "trial": each.number,
                    "setting": dict(each.setting),
                    "statuses": list(each.statuses),
                    "stopped": list(each.stopped),
                    "missing": each.missing,
                    **{name: None if math.isnan(value := getattr(each, name)) else value for name in NUMBERS},
                }
                for each in tried
            ],
            **extra,
        },
    }


def _of_halving(spec: ExperimentSpec, job: Job, records: Records, race: Race) -> dict[str, Any]:
    """What a record says of a race, as plain data.

    seeds: that decided. metric: at the rungs. at: where the curve and the windows are, in words; None: at the end.
    rungs: of each that was held its step (None where trials differ in steps), how many were in, and each one's mean.
    left: the numbers of the trials that were left. told: how each trial stands, in words.
    """
    halving, members = in_force(spec, job), deciding(spec, job)
    counts = {training.train.steps for each in members.values() for training in each}
    steps = next(iter(counts)) if len(counts) == 1 else None

    def place(rung: int) -> str:
        if steps is None:
            return f"{halving.rungs[rung]:.4g} of the steps"
        return f"step {halving.step(rung, steps):,} of {steps:,}"

    def means(rung: int) -> dict[str, float | None]:
        found = {}
        for number in race.rounds[rung]:
            known = [mean_of(scored_at(records(training.job), rung)) for training in members[number]]
            whole = not any(map(math.isnan, known))
            found[str(number)] = sum(sorted(known)) / len(known) if whole else None
        return found

    def hopeless(number: int, rung: int) -> int:
        return hopeless_at(halving, members[number], records, rung)

    return {
        "seeds": list(spec.deciding_seeds(job.model)),
        "metric": halving.metric or task_of(spec, job).metric,
        "at": None if race.level is None else place(race.level),
        "rungs": [
            {"at": place(rung), "trials": len(among), "scores": means(rung)} for rung, among in enumerate(race.rounds)
        ],
        "left": list(race.left),
        "told": {
            str(number): _words(race, number, [records(training.job) for training in each], place, hopeless)
            for number, each in members.items()
        },
    }


def _words(
    race: Race,
    number: int,
    records: Sequence[Mapping[str, Any]],
    place: Callable[[int], str],
    hopeless: Callable[[int, int], int],
) -> str:
    """dropped at step 120 of 480 (hopeless from 2 of 3 seeds).

    hopeless: of (trial, rung), from how many seeds it had ended so by then.
    """
    statuses = dict.fromkeys(_status(record) for record in records)
    if {"finished", *PAUSED}.isdisjoint(statuses):
        return ", ".join(statuses)
    gone = race.dropped_at(number)
    if gone is not None:
        seeds = hopeless(number, gone)
        whose = "" if len(records) == 1 else f" from {seeds} of {len(records)} seeds"
        return f"dropped at {place(gone)}" + (f" ({HOPELESS}{whose})" if seeds else "")
    return f"chosen at {place(len(race.rounds) - 1)}" if race.left == (number,) else ", ".join(statuses)


def validation_of(spec: ExperimentSpec, model_name: str) -> dict[str, Any]:
    """The prompts that trials of a model are scored on, as records tell them."""
    return spec.sweep_of(model_name).validation.model_dump(mode="json")
