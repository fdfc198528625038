"""Whether a run that is gone on with is the one that was begun: its recipe may have been edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contextlab.errors import InputError
from contextlab.experiments.choice import validation_of
from contextlab.experiments.folder import FINAL, RunFolder
from contextlab.experiments.jobs import Job, Training
from contextlab.experiments.rungs import PAUSED
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.trial import trial_record
from contextlab.spec import picture
from contextlab.training import checkpoint
from contextlab.training.trainer import task_as_data


def require_as_begun(folder: RunFolder, spec: ExperimentSpec) -> None:
    """Refuse to go on where what is done is of other settings than the recipe says by now: it may have been edited.

    More seeds, models or trials at the end may be added. Raises InputError that says what differs.
    """
    tasks = {name: task_as_data(spec.build_task(name)) for name in spec.tasks}
    for name in tasks:
        _require_tasks(folder, Job("learners", task=name), spec, tasks)
    for training in spec.trainings():
        record = _require_tasks(folder, training.job, spec, tasks)
        if record.get("status") in (*FINAL, *PAUSED):  # of what is half done its checkpoint says what it is
            _require_specs(folder, training, record)
        _require_scores(folder, spec, training, record)


def _require_specs(folder: RunFolder, training: Training, record: Mapping[str, Any]) -> None:
    """Refuse what is done of another model, or was trained otherwise, than the recipe says by now."""
    was, named = record.get("tasks"), list(training.tasks)
    if isinstance(was, list) and was != named:
        raise _edited(folder, training.job, f"trained on {', '.join(was)}", ", ".join(named))
    for key, now in (("train_spec", training.train), ("model_spec", training.model)):
        wanted = now.model_dump(mode="json")
        if not isinstance(record.get(key), Mapping) or record[key] == wanted:
            continue
        try:
            then = type(now).parse(record[key]).model_dump(mode="json")
        except InputError:  # of another version
            continue
        for where, before, after in checkpoint.differences(then, wanted):
            raise _edited(folder, training.job, f"made with {where} {picture(before)}", picture(after))


def _require_scores(folder: RunFolder, spec: ExperimentSpec, training: Training, record: Mapping[str, Any]) -> None:
    """Refuse a trial that was scored on other prompts than the recipe has by now, at other rungs, or in another way."""
    if training.trial is None:
        return
    known, now = record.get("validation_spec"), validation_of(spec, training.model_name)
    for where, before, after in checkpoint.differences(known, now) if isinstance(known, dict) else ():
        what = f"scored with sweep.validation.{where} {picture(before)}"
        raise _edited(folder, training.job, what, picture(after))
    halving = spec.halving_of(training.model_name)
    if halving is None:
        return
    there = record.get("rungs") or []
    rungs = [halving.step(rung, training.train.steps) for rung in range(len(halving.rungs))]
    asked = {name: halving.metric or task.metric for name, task in training.tasks.items()}
    lacking = [step for step in rungs[len(there) :] if step < record.get("steps", 0)]
    other = [each["at"] for rung, each in enumerate(there) if each["at"] not in rungs[rung : rung + 1]]
    scores = [item for each in there for item in each["validation"].items()]
    metrics = {score["metric"] for name, score in scores if score["metric"] != asked.get(name)}
    if lacking and record.get("status") == "finished":
        what = f"it was trained past step {lacking[0]}, where sweep.halving would score it"
    elif other:
        what = f"it was scored at step {other[0]}, where sweep.halving has no such rung"
    elif metrics:
        wanted = ", ".join(dict.fromkeys(asked.values()))
        what = f"it was scored by {', '.join(sorted(metrics))} at its rungs, where sweep.halving asks for {wanted}"
    else:
        return
    raise InputError(
        f"{folder.job_record(training.job)}: {what} by what {folder.spec} says now; put it back, or begin another run"
    )


def _require_tasks(
    folder: RunFolder, job: Job, spec: ExperimentSpec, tasks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The record of a job, refused where it is done and was of other tasks than the recipe says by now."""
    record = trial_record(folder, job)
    known = record.get("task_specs")
    for name, was in (
        known if isinstance(known, Mapping) and record.get("status") in (*FINAL, *PAUSED) else {}
    ).items():
        now = tasks.get(name, {})
        for where, before, after in checkpoint.differences(dict(was), dict(now)):
            if where in was and where in now:  # else it is of another version
                path = f"tasks.{name}.{'task' if where == 'kind' else f'options.{where}'}"
                raise _edited(folder, job, f"made with {path} {picture(before)}", picture(after))
    return record


def _edited(folder: RunFolder, job: Job, was: str, now: str) -> InputError:
    """What was done, and what the recipe says by now."""
    return InputError(
        f"{folder.job_record(job)}: {was}, but {folder.spec} says {now}; put it back, or begin another run"
    )
