"""The trials of a sweep in a run's folder: their scores, the one that is taken over, and what is let go afterwards."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contextlab.evaluation.intervals import share_bounds
from contextlab.experiments.choice import told
from contextlab.experiments.folder import RunFolder, read_run_record
from contextlab.experiments.jobs import Job, Training, chosen_jobs, swept
from contextlab.experiments.spec import ExperimentSpec
from contextlab.files import atomic_folder, read_record
from contextlab.models import Model
from contextlab.prompt import HIGHER_IS_BETTER, Prompt
from contextlab.training import checkpoint
from contextlab.training.validation import validate


def score(
    model: Model,
    spec: ExperimentSpec,
    training: Training,
    device: torch.device,
    apart: Mapping[str, Callable[[Prompt], Prompt]],
) -> dict[str, Any]:
    """How good a trial's model is on validation prompts of each of its tasks, as plain data.

    apart: name of a task -> leaves out what the model was trained on.
    """
    wanted = spec.sweep_of(training.model_name).validation
    found = {}
    for name, task in training.tasks.items():
        scored = validate(model, task, wanted, device=device, apart=apart.get(name))
        if task.metric in HIGHER_IS_BETTER:  # as `evaluate` tells of shares
            half, count = np.array([scored.ci_high - scored.value]), np.array([scored.n])
            low, high = share_bounds(np.array([scored.value]), half, count)
            scored = scored._replace(ci_low=float(low[0]), ci_high=float(high[0]))
        found[name] = {"metric": task.metric, **plain(scored._asdict())}
    return found


def plain(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as records have them: None for what is no number."""
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def chosen_training(folder: RunFolder, spec: ExperimentSpec, job: Job) -> tuple[Training, dict[str, Any]]:
    """The training that a job of kind "training" measures, and what its record says of the sweep, if there is one."""
    if not swept(spec, job):
        return spec.candidates(job)[0], {}
    found = told(spec, job, lambda trial: trial_record(folder, trial))
    return spec.candidates(job)[found["trial"]], found


def measured_training(spec: ExperimentSpec, job: Job, record: Mapping[str, Any]) -> Training:
    """The training that was measured, by its record; nothing is chosen again."""
    return spec.candidates(job)[record["trial"] if swept(spec, job) else 0]


def stale(folder: RunFolder, spec: ExperimentSpec) -> set[Job]:
    """Jobs that measured another trial than is the best by now, as one that had failed was tried again."""
    found = set()
    choices: dict[tuple[str, str], int] = {}
    for job in chosen_jobs(spec):
        path = folder.job_record(job)
        if path.exists():
            if (job.task, job.model) not in choices:
                choices[job.task, job.model] = chosen_training(folder, spec, job)[1]["trial"]
            if read_run_record(path).get("trial") != choices[job.task, job.model]:
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
    for path in own.glob("step_*"):
        shutil.rmtree(path)
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
                for path in folder.training(training.job).glob("step_*"):
                    shutil.rmtree(path, ignore_errors=True)


def trial_record(folder: RunFolder, job: Job) -> dict[str, Any]:
    """The record of a trial; empty where there is none yet."""
    path = folder.job_record(job)
    return read_run_record(path) if path.exists() else {}


def _is_of(path: Path, training: Training) -> bool:
    """Whether a checkpoint is of this training."""
    known = read_record(path / checkpoint.RECORD, checkpoint.KEYS)["is"]
    wanted = {"model": training.model, "train": training.train}
    return known.get("seed") == training.seed and all(
        known.get(name) == spec.model_dump(mode="json") for name, spec in wanted.items()
    )
