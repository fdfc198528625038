"""To do one job of a run in this process, and write what it gives."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from contextlab.allocator import keep_freed_memory
from contextlab.errors import ContextlabError, InputError, first_line
from contextlab.evaluation import Measured, measure, measure_learners, static_cost, write_results
from contextlab.evaluation.compress import compress
from contextlab.evaluation.results import COMPRESS_COLUMNS
from contextlab.experiments.choice import validation_of
from contextlab.experiments.distill import described, learning
from contextlab.experiments.folder import RunFolder, evaluations, read_run_record
from contextlab.experiments.jobs import Job, Training, trained_for
from contextlab.experiments.progress import Progress
from contextlab.experiments.rungs import pause_at, words
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.starts import new_model
from contextlab.experiments.subjects import loaders
from contextlab.experiments.trial import (
    chosen_training,
    compressed_trials,
    go_back,
    inspected_trial,
    measured_training,
    score,
    take_over,
)
from contextlab.files import locked, make_folder, read_record, write_json, write_record
from contextlab.inspect.looking import look, write_looked
from contextlab.memory import lack_of_memory
from contextlab.models import Model
from contextlab.prompt import Prompt
from contextlab.training import checkpoint, train
from contextlab.training.examples import draw_examples, fingerprints, without_known
from contextlab.training.run import TrainResult, stopped_of
from contextlab.training.schedule import Turns
from contextlab.training.trainer import task_as_data


def do_job(
    folder: RunFolder, spec: ExperimentSpec, job: Job, device: torch.device, tell: Progress, training: bool = True
) -> str:
    """Do one job and write its tables and its record. A fault of the job is recorded, not raised.

    training: whether models may be trained; False measures those that are.

    Returns its status: "finished", "diverged", "failed", or of a trial "paused".
    """
    keep_freed_memory()
    make_folder(folder.job_record(job).parent)
    # A worker of a run that was killed may still be saving: it ends within a step, so wait for it.
    with locked(folder.lock(job)):
        return _recorded(folder, spec, job, device, tell, training)


def _recorded(
    folder: RunFolder, spec: ExperimentSpec, job: Job, device: torch.device, tell: Progress, training: bool
) -> str:
    path = folder.job_record(job)
    before = read_run_record(path) if path.exists() else {}
    record = {**before, **job.fields, "status": "running", "message": ""}
    for of_before in ("evaluate_spec", "files"):
        record.pop(of_before, None)
    if folder.table(job).exists():
        write_record(path, record)  # from here on it is not known what the table there was measured with
    try:
        if job.kind == "trial":
            _train_and_score(folder, spec, job, record, device, tell)
        elif job.kind == "training":
            _train_and_measure(folder, spec, job, record, device, tell, training)
        elif job.kind == "learners":
            tell.phase(job.key, "evaluating")
            task = spec.build_task(job.task)
            record["task_specs"] = {job.task: task_as_data(task)}
            found = measure_learners(task, spec.evaluate_spec(job.task), run=spec.name, task_name=job.task)
            found.write(folder.table(job))
        elif job.kind == "inspect":
            record["looked_trial"] = inspected_trial(folder, spec, job)
            _look(folder, spec, job, device, tell)
        else:
            record["trials"] = compressed_trials(folder, spec, job)
            _measure_compressed(folder, spec, job, device, tell)
        if record["status"] == "running":
            record["status"] = "finished"
            if job.kind != "trial":
                record["evaluate_spec"] = evaluations(job, spec)
    except KeyboardInterrupt:
        record |= {"status": "interrupted", "message": "stopped by the user"}
        raise
    except Exception as raised:  # one job's failure must not take the others with it
        record |= {"status": "failed", "message": _fault(raised)}
        if not isinstance(lack_of_memory(raised) or raised, ContextlabError):
            with folder.log(job).open("a") as log:
                log.write(traceback.format_exc())
    finally:
        record["files"] = folder.checksums(_written(folder, job)) if record["status"] == "finished" else {}
        write_record(path, record)
        tell.done(job.key, record["status"], record["message"])
    if record["status"] == "failed":  # what did not fit is let go before the next job
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return str(record["status"])


def _fault(raised: Exception) -> str:
    error = lack_of_memory(raised) or raised
    return first_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"


def _written(folder: RunFolder, job: Job) -> list[Path]:
    """The tables that the job wrote, and the list of what it left out."""
    table = folder.table(job)
    if job.kind == "trial":
        return []
    own = "*.parquet" if job.kind == "training" else f"{table.stem}.*parquet"
    left_out = [folder.left_out(job)] if job.kind in ("compress", "inspect") else []
    return [*table.parent.glob(own), *left_out]


def _train_and_measure(
    folder: RunFolder,
    spec: ExperimentSpec,
    job: Job,
    record: dict[str, Any],
    device: torch.device,
    tell: Progress,
    may_train: bool,
) -> None:
    if may_train:
        training, of_sweep = chosen_training(folder, spec, job)
        record |= of_sweep
        if of_sweep:
            take_over(folder, job, training)
    else:
        training = measured_training(spec, job, record)
    record |= _described(training)
    if may_train:
        model = _train(folder, job, training, record, device, tell)
        if record["status"] == "diverged":
            return
    else:
        model = load_trained(folder, job).to(device)
        record |= _as_trained(folder, job, model)
    tell.phase(job.key, "evaluating")
    if training.train.examples is not None:
        record["training_set"] = {}
    parts = [_measure(model, spec, training, name, record) for name in training.tasks]
    Measured.join(parts).write(folder.table(job))


def _train_and_score(
    folder: RunFolder, spec: ExperimentSpec, job: Job, record: dict[str, Any], device: torch.device, tell: Progress
) -> None:
    """One trial of a sweep. Its losses stay with its checkpoint: a record of each of thousands is read again."""
    training = spec.training(job)
    ties = spec.sweep_of(training.model_name).ties(training.setting)
    record |= {**_described(training), "setting": dict(training.setting), "tied": dict(ties)}
    record.pop("validation", None)
    halving, steps = spec.halving_of(job.model), training.train.steps
    before = 0 if halving is None else len(halving.rungs) if job.rung is None else job.rung
    if len(record.get("rungs", ())) < before:  # it failed at one, and other seeds kept it in: it is scored there first
        _train_and_score(folder, spec, replace(job, rung=before - 1), record, device, tell)
        if record["status"] != "paused":
            return
        record["status"], record["message"] = "running", ""
    pause = pause_at(spec, training, job.rung)
    if pause is not None:
        go_back(folder, job, pause)
    model = _train(folder, job, training, record, device, tell, pause)
    del record["history"]
    if record["status"] == "diverged":
        return
    tell.phase(job.key, "validating")
    fixed = training.train.examples is not None
    apart = {name: _training_set(training, name, record["steps"])[0] for name in training.tasks} if fixed else {}
    if job.rung is not None:
        assert halving is not None
        found = score(model, spec, training, device, apart, halving.metric)
        rungs = record.get("rungs", [])[: job.rung]
        record["rungs"] = [*rungs, {"at": pause, "step": record["steps"], "validation": found}]
        record["validation_spec"] = validation_of(spec, training.model_name)
        if record["status"] == "paused":
            record["message"] = words("", record["steps"], steps)
            return
    record["validation"] = score(model, spec, training, device, apart)
    record["validation_spec"] = validation_of(spec, training.model_name)


def _described(training: Training) -> dict[str, Any]:
    return {
        "tasks": list(training.tasks),
        "task_specs": {name: task_as_data(task) for name, task in training.tasks.items()},
        "model_spec": training.model.model_dump(mode="json"),
        "train_spec": training.train.model_dump(mode="json"),
    }


def _train(
    folder: RunFolder,
    job: Job,
    training: Training,
    record: dict[str, Any],
    device: torch.device,
    tell: Progress,
    pause: int | None = None,
) -> Model:
    key = job.key
    model, started = new_model(training)
    record |= {**started, **described(training)}
    record["parameters"] = model.parameter_count
    tell.phase(key, "training")
    with learning(model, training, device) as (learner, tasks):
        result = train(
            learner,
            tasks,
            training.train,
            seed=training.seed,
            device=device,
            folder=folder.training(job),
            resume=True,  # an empty folder starts at step 0; the run as a whole has been told whether to resume
            pause=pause,
            progress=lambda step, steps, loss: tell.update(key, step, steps, loss),
        )
    if training.train.until is not None:
        record |= {"looks": result.looks, "stopped": result.stopped}
    record |= {
        "message": result.message,
        "steps": result.step,
        "threads": result.threads,
        "seconds": _seconds(result),
        "history": result.history.to_dict("list"),
    }
    if result.status != "finished":
        record["status"] = result.status
    return model


def _seconds(result: TrainResult) -> float:
    """Of all calls, where the training was resumed."""
    if result.status != "paused":
        return float(result.history["seconds"].iloc[-1])
    assert result.checkpoint is not None
    return float(read_record(result.checkpoint / checkpoint.RECORD, checkpoint.KEYS)["seconds"])  # between two rows


def _as_trained(folder: RunFolder, job: Job, model: Model) -> dict[str, Any]:
    """What the last checkpoint says of a training that has finished, as records have it."""
    last = checkpoint.newest(folder.training(job))
    assert last is not None
    found = read_record(last / checkpoint.RECORD, checkpoint.KEYS)
    rows = found["history"]
    history = {name: [row[name] for row in rows] for name in rows[-1]}
    return {"parameters": model.parameter_count, "steps": found["step"], "seconds": rows[-1]["seconds"]} | {
        "message": found.get("stopped", ""),
        "stopped": stopped_of(found),
        "threads": found.get("threads"),
        "history": history,
    }


def trained(folder: RunFolder, job: Job) -> bool:
    """Whether the training has a checkpoint of its end, from finite losses."""
    last = checkpoint.newest(folder.training(job))
    return last is not None and read_record(last / checkpoint.RECORD, checkpoint.KEYS).get("status") == "finished"


def load_trained(folder: RunFolder, job: Job) -> Model:
    """The model of a training that has finished. Raises InputError where it has not."""
    last = checkpoint.newest(folder.training(job))
    if last is None or not trained(folder, job):
        raise InputError(f"the training of {job.model} has not finished")
    return checkpoint.load(last)


def _measure(model: Model, spec: ExperimentSpec, training: Training, task: str, record: dict[str, Any]) -> Measured:
    """The tables of a trained model on one of its tasks: quality, then costs."""
    apart = None
    if training.train.examples is not None:
        apart, record["training_set"][task] = _training_set(training, task, record["steps"])
    who: dict[str, Any] = {
        "name": training.model_name,
        "run": spec.name,
        "seed": training.seed,
        "task_name": task,
    }
    found = measure(model, training.tasks[task], training.evaluate[task], apart=apart, **who)
    costs = static_cost(model, int(found.results["length"].iloc[0]), **who)
    took = costs.iloc[:1].assign(metric="training_seconds", value=record["seconds"], ci_low=None, ci_high=None)
    return Measured.join([found, Measured(costs), Measured(took)])


def _training_set(training: Training, task: str, steps: int) -> tuple[Callable[[Prompt], Prompt], dict[str, Any]]:
    """What leaves the prompts of a fixed training set out of an evaluation, and what the record tells of the set.

    steps: that were made. examples: its prompts. distinct: different ones among them. epochs: how often each was shown.
    """
    spec = training.train
    assert spec.examples is not None
    known = fingerprints(draw_examples(training.tasks[task], spec.examples, training.seed).inputs).unique()
    turns = Turns(list(training.tasks.values()), spec, training.seed)
    which = list(training.tasks).index(task)
    shown = spec.batch * sum(turns.which(step) == which for step in range(steps))
    told = {"examples": spec.examples, "distinct": len(known), "epochs": shown / spec.examples}
    return without_known(known), told


def _measure_compressed(
    folder: RunFolder, spec: ExperimentSpec, job: Job, device: torch.device, tell: Progress
) -> None:
    """What the model of one seed loses under the recipe's policies."""
    wanted = spec.compress
    assert wanted is not None
    of_seed = {each.model: each for each in spec.measured() if each.seed == job.seed}
    models = {name: load_trained(folder, of_seed[name]).to(device) for name in (wanted.model, *wanted.compare)}
    doing = ""

    def progress(text: str) -> None:
        nonlocal doing
        if doing != (doing := text.partition(":")[0]):
            tell.phase(job.key, doing)

    left_out: list[str] = []
    model = models.pop(wanted.model)
    found = compress(
        model, wanted.policies, wanted.budgets, wanted.tasks, wanted.lengths, prompts=wanted.prompts,
        batch=wanted.batch, seed=job.seed, name=wanted.model, compare=models, decoded=wanted.decoded, fit=wanted.fit,
        left_out=left_out, progress=progress,
    )  # fmt: skip
    write_json(folder.left_out(job), left_out)
    write_results(found, folder.table(job), COMPRESS_COLUMNS)


def _look(folder: RunFolder, spec: ExperimentSpec, job: Job, device: torch.device, tell: Progress) -> None:
    """What the recipe's probes find inside a trained model."""
    wanted = spec.inspect
    assert wanted is not None
    own = trained_for(spec, job)
    found = look(
        load_trained(folder, own).to(device), spec.build_task(job.task), wanted.probes, seed=wanted.seed,
        name=job.model, run=spec.name, task_name=job.task, training_seed=job.seed,
        checkpoints=loaders(folder.path, folder.training(own), device), skip=True,
        progress=lambda text: tell.phase(job.key, text),
    )  # fmt: skip
    write_json(folder.left_out(job), found.left_out)
    write_looked(found.table, folder.table(job))
