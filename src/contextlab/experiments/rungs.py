"""The race of a sweep's trials, as the records of a run tell of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from contextlab.experiments.folder import HALVED
from contextlab.experiments.halving import HalvingSpec, Race, race
from contextlab.experiments.jobs import Job, Training
from contextlab.experiments.spec import ExperimentSpec
from contextlab.prompt import Task
from contextlab.training.until import rises

Scores = Mapping[str, Mapping[str, Any]]
"""Task -> metric, value, ci_low, ci_high, n; None for what is no number."""


def race_of(
    spec: ExperimentSpec, job: Job, records: Callable[[Job], Mapping[str, Any]], rungs: int | None = None
) -> Race:
    """Who goes on of the trials of the model and task of a job of kind "training". Their halving is in force.

    records: of a trial's job; empty where it has not begun. rungs: how many are held, the first; None: all.
    """
    halving = in_force(spec, job)
    read = cache(records)
    members = deciding(spec, job)

    def scores(rung: int, trial: int) -> list[float]:
        return [mean_of(scored_at(read(training.job), rung)) for training in members[trial]]

    def hopeless(rung: int, trial: int) -> int:
        return hopeless_at(halving, members[trial], read, rung)

    lost = [
        trial
        for trial, trainings in members.items()
        if any(read(each.job).get("status") == "diverged" and read(each.job).get("rungs") for each in trainings)
    ]
    return race(halving, list(members), scores, higher_is_better(halving, task_of(spec, job)), rungs, lost, hopeless)


def rungs_held(spec: ExperimentSpec, job: Job, records: Callable[[Job], Mapping[str, Any]]) -> int:
    """How many rungs need no more scores: at the next one a trial that is in is still to come."""
    read, members = cache(records), deciding(spec, job)
    rungs = len(in_force(spec, job).rungs)
    for rung in range(1, rungs):
        left = race_of(spec, job, read, rung).left
        known = [read(training.job) for trial in left for training in members[trial]]
        if len(left) > 1 and any(r.get("status") in PAUSED and len(r.get("rungs") or ()) <= rung for r in known):
            return rung
    return rungs


def deciding(spec: ExperimentSpec, job: Job, numbers: Iterable[int] | None = None) -> dict[int, list[Training]]:
    """The trials of the model and task of a job of kind "training": number -> its training from each deciding seed.

    numbers: of those that are wanted; None: all.
    """
    seeds = spec.deciding_seeds(job.model)
    known = [spec.candidates(Job("training", job.task, job.model, seed)) for seed in seeds]
    wanted = range(len(known[0])) if numbers is None else numbers
    return {number: [each[number] for each in known] for number in wanted}


def most_rungs(spec: ExperimentSpec) -> int:
    """Rungs of the model that has most of them; 0 where none is halved."""
    halved = [halving for name in spec.models if (halving := spec.halving_of(name)) is not None]
    return max((len(halving.rungs) for halving in halved), default=0)


def in_force(spec: ExperimentSpec, job: Job) -> HalvingSpec:
    """The halving of a job whose model is halved."""
    halving = spec.halving_of(job.model)
    assert halving is not None
    return halving


def pause_at(spec: ExperimentSpec, training: Training, rung: int | None) -> int | None:
    """The step at which a training pauses for a rung of its halving; None: it goes to its end."""
    halving = spec.halving_of(training.model_name)
    return None if rung is None or halving is None else halving.step(rung, training.train.steps)


def task_of(spec: ExperimentSpec, job: Job) -> Task:
    """The task of a job, or the first of several, which are judged by one metric."""
    return next(iter(spec.candidates(job)[0].tasks.values()))


def higher_is_better(halving: HalvingSpec, task: Task) -> bool:
    """Whether a rung's metric is better when larger."""
    return rises(task, halving.metric or task.metric)


def scored_at(record: Mapping[str, Any], rung: int) -> Scores | None:
    """A trial's scores at a rung, from one seed; those at its end where it had ended by then (`train.until`)."""
    rungs: Sequence[Mapping[str, Any]] = record.get("rungs") or []
    if rung < len(rungs):
        found: Scores = rungs[rung]["validation"]
    elif rungs and record.get("status") == "finished":
        found = rungs[-1]["validation"]
    else:
        return None
    return None if any(score["value"] is None for score in found.values()) else found


def hopeless_at(
    halving: HalvingSpec, trainings: Sequence[Training], records: Callable[[Job], Mapping[str, Any]], rung: int
) -> int:
    """How many of a trial's trainings are scored at a rung, but had ended by then as hopeless (`train.until`).

    What ends later does not count there: a rung that was held is decided alike whoever asks when.
    """

    def ended(training: Training) -> bool:
        record = records(training.job)
        by_then = record.get("stopped") == HOPELESS and record["steps"] <= halving.step(rung, training.train.steps)
        return by_then and not math.isnan(mean_of(scored_at(record, rung)))

    return sum(map(ended, trainings))


def mean_of(scores: Scores | None) -> float:
    """The mean over tasks; nan where there is no score."""
    if not scores:
        return math.nan
    return sum(score["value"] for score in scores.values()) / len(scores)


def standing(race: Race, trial: int, status: str) -> str:
    """How a trial stands from one seed, by its record's status and the race: "dropped", "chosen" where it alone is left
    and goes on in the job that measures it; else what the record says, such as "finished" or "diverged"."""
    if status not in PAUSED:
        return status
    if trial not in race.left:
        return "dropped"
    return "chosen" if len(race.left) == 1 else "paused"


HOPELESS = "hopeless"
"""What records tell as `stopped` of a training that ended as hopeless."""
PAUSED = ("paused", *HALVED)
"""Statuses of a trial that stands at a rung: it may go on, does not, or does so in the job that measures it."""


def words(status: str, step: int, steps: int) -> str:
    """dropped at step 120 of 480; without a status at step 120 of 480."""
    return f"{status} at step {step:,} of {steps:,}".lstrip()
