"""Trainings of a run that go together as one program, on a GPU: before their jobs are done one by one.

What comes of each is its checkpoints, as if it had trained alone; its job then only reads the last one and measures it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from contextlab.errors import ContextlabError, InputError, first_line, unknown
from contextlab.experiments.folder import RunFolder
from contextlab.experiments.jobs import Job, Training, swept
from contextlab.experiments.progress import Progress
from contextlab.experiments.rungs import pause_at
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.starts import new_model
from contextlab.experiments.trial import chosen_training, take_over
from contextlab.files import locked, make_folder
from contextlab.memory import lack_of_memory
from contextlab.models.stacked import reasons_apart
from contextlab.training.ensemble import Member, train_together
from contextlab.training.foreign import is_foreign

Ensemble = Literal["auto", "off"]

MOST_MEMBERS = 64
MOST_PARAMETERS = 20_000_000
"""Of a model that others train with; an estimate of where one model's steps fill a GPU."""


def wanted(ensemble: str, device: torch.device) -> bool:
    """Whether trainings go together: "auto" means on CUDA. Raises InputError on another word."""
    if ensemble not in ("auto", "off"):
        raise InputError(unknown("ensemble", ensemble, ("auto", "off")))
    return ensemble == "auto" and device.type == "cuda"


def groups(spec: ExperimentSpec, todo: Sequence[Job], chosen: Sequence[Training] = ()) -> list[list[Training]]:
    """Those jobs' trainings that can go together, at least two in a group: one task and one model, by their specs.

    Seeds, learning rates and whatever else may differ between members (`train_together`) are no reason to part them.

    chosen: those of a sweep that are trained in the jobs that measure them.
    """
    known = {training.job: training for training in spec.trainings()}
    found: dict[str, list[Training]] = {}
    for training in (*(known[job] for each in todo if (job := replace(each, rung=None)) in known), *chosen):
        train = training.train
        apart = (
            train.adapter is not None
            or train.layer_skip is not None
            or is_foreign(train)
            or training.teaching is not None
            or not train.steps
        )
        if train.compile != "on" and not apart:
            form = (training.task_name, train.optimizer, train.freeze, train.accumulate, train.precision)
            key = json.dumps([*form, training.model.model_dump(mode="json")], sort_keys=True)
            found.setdefault(key, []).append(training)
    return [
        group[start : start + MOST_MEMBERS]
        for group in found.values()
        for start in range(0, len(group), MOST_MEMBERS)
        if len(group[start : start + MOST_MEMBERS]) > 1
    ]


def train_groups(
    folder: RunFolder, spec: ExperimentSpec, todo: Sequence[Job], device: torch.device, tell: Progress
) -> None:
    """Train all that can go together, up to checkpoints of their ends or of the rungs at which they pause.

    What cannot, because of a part that declares so or of its size, is left to its job; so is a group that fails, with a
    warning that says why.
    """
    jobs = {replace(job, rung=None): job for job in todo}
    rest = _rest(folder, spec, todo)
    jobs |= {training.job: job for job, training in rest.items()}
    for group in groups(spec, todo, list(rest.values())):
        members = [_Member(each, jobs[each.job], pause_at(spec, each, jobs[each.job].rung)) for each in group]
        try:
            _train(folder, members, device, tell)
        except Exception as raised:  # the jobs go on from the checkpoints that there are, or tell the fault as theirs
            error = lack_of_memory(raised) or raised
            why = first_line(error) if isinstance(error, ContextlabError) else f"{type(error).__name__}: {error}"
            message = f"{group[0].task_name}, {group[0].model_name}: {len(group)} trainings go one by one: {why}"
            warnings.warn(message, stacklevel=2)


def _rest(folder: RunFolder, spec: ExperimentSpec, todo: Sequence[Job]) -> dict[Job, Training]:
    """What is left of halved sweeps in the jobs that measure the best trials: their way to the end, the other seeds."""
    halved = [job for job in todo if job.kind == "training" and swept(spec, job) and spec.halving_of(job.model)]
    return {job: chosen_training(folder, spec, job)[0] for job in halved}


class _Member(NamedTuple):
    """A training, the job that it is part of, and the step at which it pauses; None: it goes to its end."""

    training: Training
    job: Job
    pause: int | None


def _train(folder: RunFolder, group: Sequence[_Member], device: torch.device, tell: Progress) -> None:
    first = new_model(group[0].training)[0]
    if reasons_apart(first) or first.parameter_count > MOST_PARAMETERS:
        return
    models = [first, *(new_model(each.training)[0] for each in group[1:])]
    with ExitStack() as held:
        for training, job, _ in group:
            make_folder(folder.job_record(job).parent)
            held.enter_context(locked(folder.lock(job)))
            if job != training.job and job.kind == "training":
                take_over(folder, job, training)
            tell.phase(job.key, "training")
        members = [
            Member(model, list(each.tasks.values()), each.train, each.seed, folder.training(job), pause)
            for model, (each, job, pause) in zip(models, group, strict=True)
        ]
        train_together(
            members,
            device=device,
            resume=True,
            progress=lambda member, step, steps, loss: tell.update(group[member].job.key, step, steps, loss),
        )
