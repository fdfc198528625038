"""The trials of a sweep in a run's folder: their scores, the one that is taken over, and what is let go afterwards."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contextlab.errors import InputError
from contextlab.evaluation.intervals import share_bounds, usual
from contextlab.experiments.choice import Records, told
from contextlab.experiments.folder import RunFolder, read_run_record
from contextlab.experiments.halving import Race
from contextlab.experiments.jobs import Job, Training, chosen_jobs, compress_jobs, inspect_jobs, swept, trained_for
from contextlab.experiments.rungs import PAUSED, deciding, in_force, race_of, rungs_held, standing, words
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.values import MOST_TRIALS
from contextlab.files import atomic_folder, read_record, write_record
from contextlab.models import Model
from contextlab.prompt import HIGHER_IS_BETTER, Prompt
from contextlab.training import checkpoint
from contextlab.training.validation import score_of, values_of

LARGE = ("model_spec", "train_spec", "task_specs", "history")
"""What records of trials tell that no choice among these asks for."""


def score(
    model: Model,
    spec: ExperimentSpec,
    training: Training,
    device: torch.device,
    apart: Mapping[str, Callable[[Prompt], Prompt]],
    metric: str | None = None,
) -> dict[str, Any]:
    """How good a trial's model is on validation prompts of each of its tasks, as plain data.

    apart: name of a task -> leaves out what the model was trained on.
    metric: of all tasks; None takes each task's own.
    """
    wanted = spec.sweep_of(training.model_name).validation
    found = {}
    for name, task in training.tasks.items():
        named = metric or task.metric
        values = values_of(model, task, wanted, [named], device=device, apart=apart.get(name))[named]
        scored = score_of(values)
        if named in HIGHER_IS_BETTER and scored.n > 1:  # as `evaluate` tells of shares
            half, count = np.array([scored.ci_high - scored.value]), np.array([scored.n])
            low, high = share_bounds(np.array([scored.value]), half, count, usual(values.numpy())[1])
            scored = scored._replace(ci_low=float(low[0]), ci_high=float(high[0]))
        found[name] = {"metric": named, **plain(scored._asdict())}
    return found


def plain(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as records have them: None for what is no number."""
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def chosen_training(folder: RunFolder, spec: ExperimentSpec, job: Job) -> tuple[Training, dict[str, Any]]:
    """The training that a job of kind "training" measures, and what its record says of the sweep, if there is one."""
    if not swept(spec, job):
        return spec.candidates(job)[0], {}
    found = told(spec, job, _scores(folder))
    return spec.candidates(job)[found["trial"]], found


def measured_training(spec: ExperimentSpec, job: Job, record: Mapping[str, Any]) -> Training:
    """The training that was measured, by its record; nothing is chosen again. Raises InputError where it is gone."""
    candidates, number = spec.candidates(job), record["trial"] if swept(spec, job) else 0
    if number >= len(candidates):
        raise InputError(
            f"trial {number} was measured, but the recipe has {len(candidates)} trials by now, counted from 0; put the "
            "values back"
        )
    return candidates[number]


def rung_jobs(folder: RunFolder, spec: ExperimentSpec, rung: int) -> list[Job]:
    """What is to be done once the rungs before this one are held: trials that go on up to it, or after the last one to
    their ends. Where one trial is left, none: it goes on in the jobs that measure it.

    Which trials those are follows from the records of the rungs before, whatever has been done since.
    """
    found = []
    for job in _halved(spec):
        rungs = len(in_force(spec, job).rungs)
        if rung > rungs:
            continue
        race = race_of(spec, job, _scores(folder), rung)
        members = deciding(spec, job)
        if rung == rungs:
            _tell_standings(folder, spec, job, race)
        if len(race.left) > 1:
            at = None if rung == rungs else rung
            found += [replace(each.job, rung=at) for number in race.left for each in members[number]]
    return [job for job in found if not folder.done(job, spec)]


def tell_standings(folder: RunFolder, spec: ExperimentSpec) -> None:
    """Write into the records of all trials that are halved how they stand by the rungs that are held by now."""
    read = _scores(folder)
    for job in _halved(spec):
        _tell_standings(folder, spec, job, race_of(spec, job, read, rungs_held(spec, job, read)))


def _tell_standings(folder: RunFolder, spec: ExperimentSpec, job: Job, race: Race) -> None:
    """Write into the trials' records how they stand by now; one that has ended is left as it is."""
    for number, trainings in deciding(spec, job).items():
        for training in trainings:
            record = trial_record(folder, training.job)
            now = standing(race, number, record.get("status", "missing"))
            if now in PAUSED and now != record["status"]:
                message = words(now, record["steps"], training.train.steps)
                write_record(folder.job_record(training.job), {**record, "status": now, "message": message})


def replaced(folder: RunFolder, spec: ExperimentSpec) -> bool:
    """Whether a trial that was left alone has diverged in the job that measures it: the next best goes on in its place.

    Its record tells it from then on, so that whoever asks again chooses the same.
    """
    found = False
    for job in _halved(spec):
        race = race_of(spec, job, _scores(folder))
        gone = False
        for training in deciding(spec, job)[race.left[0]] if len(race.left) == 1 else ():
            own, measured = trial_record(folder, training.job), trial_record(folder, training.measured)
            of_it = measured.get("status") == "diverged" and measured.get("trial") == training.trial
            if of_it and own.get("status") in PAUSED:
                told = {name: measured[name] for name in ("status", "message", "steps", "seconds")}
                write_record(folder.job_record(training.job), {**own, **told})
                gone = True
        found |= gone
    if found:
        tell_standings(folder, spec)
    return found


def decided_otherwise(folder: RunFolder, spec: ExperimentSpec) -> bool:
    """Whether trials that are halved stand otherwise by what the recipe says now than what was measured tells."""
    for job in chosen_jobs(spec):
        if spec.halving_of(job.model) is not None:
            record, now = trial_record(folder, job), chosen_training(folder, spec, job)[1]
            before = record.get("sweep", {}).get("halving") or {}
            if any(before.get(key) != now["sweep"]["halving"][key] for key in ("seeds", "metric", "rungs", "left")):
                return True
    return False


def _halved(spec: ExperimentSpec) -> list[Job]:
    """A job of kind "training" for each model and task whose trials are halved."""
    return [job for job in chosen_jobs(spec) if job.seed == spec.seeds[0] and spec.halving_of(job.model) is not None]


def go_back(folder: RunFolder, job: Job, step: int) -> None:
    """Remove a trial's checkpoints of later steps, where it is to be scored at this one: its record was lost."""
    for path in folder.training(job).glob("step_*"):
        if checkpoint.is_checkpoint(path) and checkpoint.step_of(path) > step:
            checkpoint.remove(path)


def stale(folder: RunFolder, spec: ExperimentSpec) -> set[Job]:
    """Jobs that measured another trial than is the best by now, as one that had failed was tried again.

    Records of the others are told of all trials as they are by now.
    """
    found = set()
    choices: dict[tuple[str, str], dict[str, Any]] = {}
    for job in chosen_jobs(spec):
        path = folder.job_record(job)
        if path.exists():
            if (job.task, job.model) not in choices:
                choices[job.task, job.model] = chosen_training(folder, spec, job)[1]
            record, now = read_run_record(path), choices[job.task, job.model]
            if record.get("trial") != now["trial"]:
                found.add(job)
            elif record.get("sweep") != now["sweep"]:
                write_record(path, {**record, **now})
    return found


def compressed_trials(folder: RunFolder, spec: ExperimentSpec, job: Job) -> dict[str, int]:
    """Which trial each model of a job of kind "compress" is of by now; none of models that are not swept."""
    assert spec.compress is not None
    wanted = (spec.compress.model, *spec.compress.compare)
    jobs = [each for each in chosen_jobs(spec) if each.seed == job.seed and each.model in wanted]
    records = {each.model: trial_record(folder, each) for each in jobs}
    return {model: record["trial"] for model, record in records.items() if "trial" in record}


def stale_compressed(folder: RunFolder, spec: ExperimentSpec) -> set[Job]:
    """Jobs of kind "compress" that measured models of other trials than are the best by now."""
    found = set()
    for job in compress_jobs(spec):
        record = trial_record(folder, job)
        now = compressed_trials(folder, spec, job)
        if record.get("trials", now) != now:
            found.add(job)
    return found


def inspected_trial(folder: RunFolder, spec: ExperimentSpec, job: Job) -> int | None:
    """Which trial the model of a job of kind "inspect" is of by now; None of one that is not swept."""
    of = trained_for(spec, job)
    return trial_record(folder, of).get("trial") if swept(spec, of) else None


def stale_inspected(folder: RunFolder, spec: ExperimentSpec) -> set[Job]:
    """Jobs of kind "inspect" that looked into models of other trials than are the best by now."""
    found = set()
    for job in inspect_jobs(spec):
        now = inspected_trial(folder, spec, job)
        if trial_record(folder, job).get("looked_trial", now) != now:
            found.add(job)
    return found


def take_over(folder: RunFolder, job: Job, training: Training) -> None:
    """Give a job of kind "training" the checkpoint of the trial that was chosen; what it has of another one goes.

    Where the trial has none any more, the job's own stays, and where that is lost, the job trains the model again.
    """
    own = folder.training(job)
    last, there = checkpoint.newest(own), checkpoint.newest(folder.training(training.job))
    if last is not None and _is_of(last, training):
        return
    checkpoint.clear(own)
    if there is not None:
        with atomic_folder(own / there.name) as temporary:
            shutil.copytree(there, temporary, dirs_exist_ok=True)


def let_go(folder: RunFolder, spec: ExperimentSpec, done: set[Job]) -> None:
    """Remove the checkpoints of trials of which the best has been measured: it keeps its own in `trainings/`.

    done: jobs that are; while one of a model and task is not, all trials' checkpoints stay.
    """
    jobs = chosen_jobs(spec)
    kept = {(job.task, job.model) for job in jobs if job not in done}
    for job in jobs:
        if (job.task, job.model) not in kept:
            for training in spec.candidates(job):
                checkpoint.clear(folder.training(training.job))


def trial_record(folder: RunFolder, job: Job) -> dict[str, Any]:
    """The record of a trial; empty where there is none yet."""
    path = folder.job_record(job)
    return read_run_record(path) if path.exists() else {}


def _scores(folder: RunFolder) -> Records:
    """How trials ended and their scores, each read once: each seed's choice asks for those of all seeds."""

    def read(trial: Job) -> Mapping[str, Any]:
        path = folder.job_record(trial)
        try:
            there = path.stat()
        except OSError:
            return {}
        return _read_score(path, (there.st_ino, there.st_mtime_ns, there.st_size))

    return read


@lru_cache(maxsize=MOST_TRIALS)
def _read_score(path: Path, written: tuple[int, ...]) -> Mapping[str, Any]:
    """written: by which a file is told from the one that it replaced."""
    record = read_run_record(path)
    return {key: value for key, value in record.items() if key not in LARGE}


def _is_of(path: Path, training: Training) -> bool:
    """Whether a checkpoint is of this training."""
    known = read_record(path / checkpoint.RECORD, checkpoint.KEYS)["is"]
    wanted = {"model": training.model.model_dump(mode="json"), "train": training.train.identity()}
    return known.get("seed") == training.seed and not any(
        checkpoint.differences(known.get(name), what) for name, what in wanted.items()
    )
