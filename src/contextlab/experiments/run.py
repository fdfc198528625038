"""Run an experiment: train every model on every task (or group of tasks) from every seed, evaluate, report.

The run's folder:

    experiment.yaml          the ExperimentSpec, to run it again
    record.json              status, versions, machine, backends, device, jobs
    trainings/<key>/         checkpoints, record.json, log.txt and the tables of one training
    learners/<task>.parquet  results of the task's learners, and <task>.facets.parquet
    results.parquet          all measurements, tidy
    facets.parquet           errors by facets of the predictions, such as the distance of the fact
    similarity.parquet       how alike models' predictions are to learners'
    compress/                tables of what a model loses under policies, one a seed, and what was left out
    compress.parquet         these together, and compress.html, where the recipe asks for it
    report.html              the report
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
import yaml

from contextlab.errors import ContextlabError, InputError, ResourceError, unknown
from contextlab.evaluation import Measured, measure, measure_learners, read_results, static_cost, write_results
from contextlab.evaluation.compress import compress
from contextlab.evaluation.machine import machine_record
from contextlab.experiments.recipes import load_recipe, read_yaml
from contextlab.experiments.spec import ExperimentSpec, Training
from contextlab.files import make_folder, read_json, write_atomic, write_json
from contextlab.memory import lack_of_memory
from contextlab.models import Model, build_model, load_model
from contextlab.plugins import load_plugins
from contextlab.prompt import Task
from contextlab.report import build_report, write_compress_page
from contextlab.report.naming import record_tasks
from contextlab.training import train
from contextlab.training.checkpoint import newest
from contextlab.training.distributed import resolve

FINAL = ("finished", "diverged")
SPEC, RECORD, RESULTS, REPORT = "experiment.yaml", "record.json", "results.parquet", "report.html"
COMPRESSED, COMPRESS_PAGE = "compress.parquet", "compress.html"


class Progress(Protocol):
    """What a run tells while it works; the command line draws it."""

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        """A training has made `step` of `steps` steps."""

    def phase(self, key: str, text: str) -> None:
        """A job has entered a phase: 'training', 'evaluating', ..."""

    def done(self, key: str, status: str, message: str) -> None:
        """A job has ended: 'finished', 'diverged', 'interrupted' or 'failed'."""


class Silent:
    """A Progress that says nothing."""

    def update(self, key: str, step: int, steps: int, loss: float) -> None: ...

    def phase(self, key: str, text: str) -> None: ...

    def done(self, key: str, status: str, message: str) -> None: ...


@dataclass(frozen=True)
class Run:
    """A run on disk.

    folder: where it lies. results: all measurements. records: one dict a training.
    record: the run's own record (status, versions, machine). report: the HTML page.
    facets: errors by facets of the predictions. similarity: of models to learners. Empty where nothing was measured.
    compressed: what a model loses under policies; empty where the recipe does not ask.
    """

    folder: Path
    results: pd.DataFrame
    records: list[dict[str, Any]]
    record: dict[str, Any]
    facets: pd.DataFrame
    similarity: pd.DataFrame
    compressed: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def report(self) -> Path:
        return self.folder / REPORT

    def task(self, name: str) -> Task:
        """A task of the run, by its name there. Raises InputError with the nearest name."""
        spec = load_recipe(self.folder / SPEC)
        if name not in spec.tasks:
            raise InputError(unknown("task of this run", name, spec.tasks))
        return spec.build_task(name)

    def models(self, task: str) -> dict[str, Model]:
        """The models trained on a task, alone or among others, by name; ":seed" is added where there are several."""
        records = [r for r in self.records if task in record_tasks(r) and r["status"] == "finished"]
        several = len({r["seed"] for r in records}) > 1
        found = {}
        for record in records:
            last = newest(self.folder / "trainings" / record["key"])
            if last is not None:
                found[f"{record['model']}:{record['seed']}" if several else record["model"]] = load_model(last)
        if not found:
            raise InputError(f"{self.folder}: no finished training of task {task!r} with a checkpoint")
        return found


def run(
    experiment: ExperimentSpec | dict[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    jobs: int | None = 1,
    plugins: Sequence[str] = (),
    progress: Progress | None = None,
) -> Run:
    """Train, evaluate and report an experiment.

    experiment: an ExperimentSpec, a mapping of its keys, a recipe's path or the name of one.
    out: the run's folder; None takes runs/<name>, or runs/<name>-2 and so on when that exists.
    device: "auto", "cpu" or "cuda".
    resume: go on with the unfinished run in the folder; on CPU the results are those of a run never stopped.
    jobs: trainings at once, each in a process of its own with its share of the cores; None takes as many as cores
        on CPU and one on CUDA. Worker processes know contextlab and the plugins only; 1 works in this process.
    plugins: modules (or .py files) that register components of your own.
    progress: told what happens.

    Raises InputError when the spec is wrong or the folder is taken; KeyboardInterrupt leaves a run to resume.
    """
    load_plugins(plugins)
    spec = _spec(experiment)
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    chosen = resolve(device)
    folder = _folder(spec, out, resume)
    teller = progress or Silent()
    with _locked(folder):
        record = _open(folder, spec, chosen, resume, jobs, plugins)
        try:
            _write_record(folder, record, status="running")
            for jobs_left in (_jobs, _compress_jobs):
                todo = jobs_left(folder, spec)
                if record["jobs"] == 1:
                    _run_here(folder, spec, todo, record, teller)
                else:
                    _run_workers(folder, todo, record, teller)
        except KeyboardInterrupt:
            _write_record(folder, record, status="interrupted")
            raise
        return _close(folder, spec, record)


def open_run(folder: str | Path) -> Run:
    """Read a run from disk. Raises InputError when the folder holds none, or none that has results."""
    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise InputError(f"{folder}: no run there (expected {RECORD} and {RESULTS})")
    record = read_json(folder / RECORD)
    if not (folder / RESULTS).exists():
        raise InputError(f"{folder}: the run has no results yet (status: {record.get('status')}); go on with --resume")
    records = [read_json(path) for path in sorted(folder.glob(f"trainings/*/{RECORD}"))]
    found = Measured.read([folder / RESULTS])
    compressed = read_results(folder / COMPRESSED) if (folder / COMPRESSED).exists() else pd.DataFrame()
    return Run(folder, found.results, records, record, found.facets, found.similarity, compressed)


def run_job(folder: Path, spec: ExperimentSpec, key: str, device: torch.device, tell: Progress) -> str:
    """Do one job of a run in this process and write what it gives. Returns its status."""
    if key.startswith("learners."):
        return _measure_learners(folder, spec, key.removeprefix("learners."), tell)
    if key.startswith("compress."):
        return _measure_compressed(folder, spec, key, device, tell)
    training = next(t for t in spec.trainings() if t.key == key)
    own = make_folder(folder / "trainings" / key)
    with (own / ".lock").open("w") as handle:
        # The worker of a run that was killed may still be saving: it ends within a step, so wait for it.
        fcntl.flock(handle, fcntl.LOCK_EX)
        return _train_and_measure(folder, spec, training, device, tell)


def _train_and_measure(
    folder: Path, spec: ExperimentSpec, training: Training, device: torch.device, tell: Progress
) -> str:
    key, own = training.key, make_folder(folder / "trainings" / training.key)
    record: dict[str, Any] = {
        "key": key,
        "task": training.task_name,
        "tasks": list(training.tasks),
        "model": training.model_name,
        "seed": training.seed,
        "status": "running",
        "message": "",
        "model_spec": training.model.model_dump(mode="json"),
        "train_spec": training.train.model_dump(mode="json"),
    }
    try:
        model = build_model(training.model, seed=training.seed)
        record["parameters"] = model.parameter_count
        tell.phase(key, "training")
        result = train(
            model,
            list(training.tasks.values()),
            training.train,
            seed=training.seed,
            device=device,
            folder=own,
            resume=True,  # an empty folder starts at step 0; the run as a whole has been told whether to resume
            progress=lambda step, steps, loss: tell.update(key, step, steps, loss),
        )
        record |= {
            "status": result.status,
            "message": result.message,
            "steps": result.step,
            "seconds": float(result.history["seconds"].iloc[-1]),  # of all calls, where the training was resumed
            "history": result.history.to_dict("list"),
        }
        if result.status == "finished":
            tell.phase(key, "evaluating")
            parts = [_measure(model, spec, training, name, record["seconds"]) for name in training.tasks]
            Measured.join(parts).write(own / RESULTS)
    except KeyboardInterrupt:
        record |= {"status": "interrupted", "message": "stopped by the user"}
        raise
    except Exception as raised:  # one model's failure must not take the others with it
        error = lack_of_memory(raised) or raised
        if not isinstance(error, ContextlabError):
            (own / "log.txt").open("a").write(_traceback())
        record |= {"status": "failed", "message": f"{type(error).__name__}: {_first_line(error)}"}
    finally:
        write_json(own / RECORD, record)
        tell.done(key, record["status"], record["message"])
    return record["status"]


def _measure(model: Model, spec: ExperimentSpec, training: Training, task: str, seconds: float) -> Measured:
    """The tables of a trained model on one of its tasks: quality, then costs."""
    who: dict[str, Any] = {
        "name": training.model_name,
        "run": spec.name,
        "seed": training.seed,
        "task_name": task,
    }
    found = measure(model, training.tasks[task], training.evaluate[task], **who)
    costs = static_cost(model, int(found.results["length"].iloc[0]), **who)
    took = costs.iloc[:1].assign(metric="training_seconds", value=seconds, ci_low=None, ci_high=None)
    return Measured.join([found, Measured(costs), Measured(took)])


def _measure_learners(folder: Path, spec: ExperimentSpec, task_name: str, tell: Progress) -> str:
    key = f"learners.{task_name}"
    tell.phase(key, "evaluating")
    found = measure_learners(
        spec.build_task(task_name), spec.evaluate_spec(task_name), run=spec.name, task_name=task_name
    )
    found.write(make_folder(folder / "learners") / f"{task_name}.parquet")
    tell.done(key, "finished", "")
    return "finished"


def _measure_compressed(folder: Path, spec: ExperimentSpec, key: str, device: torch.device, tell: Progress) -> str:
    """What the model of one seed loses under the recipe's policies."""
    wanted, seed = spec.compress, int(key.rpartition(".seed")[2])
    assert wanted is not None
    where = {t.model_name: folder / "trainings" / t.key for t in spec.trainings() if t.seed == seed}
    models = {}
    for name in (wanted.model, *wanted.compare):
        last = newest(where[name])
        if last is None or read_json(where[name] / RECORD)["status"] != "finished":
            tell.done(key, "failed", f"the training of {name} has not finished")
            return "failed"
        models[name] = load_model(last).to(device)
    doing = ""

    def progress(text: str) -> None:
        nonlocal doing
        if doing != (doing := text.partition(":")[0]):
            tell.phase(key, doing)

    left_out: list[str] = []
    model = models.pop(wanted.model)
    try:
        found = compress(
            model, wanted.policies, wanted.budgets, wanted.tasks, wanted.lengths, prompts=wanted.prompts,
            batch=wanted.batch, seed=seed, name=wanted.model, compare=models, decoded=wanted.decoded, fit=wanted.fit,
            left_out=left_out, progress=progress,
        )  # fmt: skip
    except InputError as error:
        tell.done(key, "failed", str(error))
        return "failed"
    own = make_folder(folder / "compress") / key.removeprefix("compress.")
    write_json(Path(f"{own}.left_out.json"), left_out)
    write_results(found, f"{own}.parquet")
    tell.done(key, "finished", "")
    return "finished"


def _run_here(folder: Path, spec: ExperimentSpec, todo: Sequence[str], record: dict[str, Any], tell: Progress) -> None:
    for key in todo:
        run_job(folder, spec, key, torch.device(record["device"]), tell)


def _run_workers(folder: Path, todo: Sequence[str], record: dict[str, Any], tell: Progress) -> None:
    workers = _Workers(folder, record, tell)
    with ThreadPoolExecutor(record["jobs"]) as pool:
        pending: set[Future[None]] = {pool.submit(workers.run, key) for key in todo}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for each in finished:
                    each.result()
        except BaseException:
            workers.stop()
            for each in pending:
                each.cancel()
            raise


class _Workers:
    """Worker processes, one job each. They end by themselves when this process dies: their input closes."""

    def __init__(self, folder: Path, record: dict[str, Any], tell: Progress) -> None:
        self.folder, self.record, self.tell = folder, record, tell
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, key: str) -> None:
        kind = key.partition(".")[0]
        own = self.folder / (kind if kind in ("learners", "compress") else f"trainings/{key}")
        log = make_folder(own) / ("log.txt" if own.parent.name == "trainings" else f"{key}.log.txt")
        command = [sys.executable, "-m", "contextlab.experiments.worker", str(self.folder), key]
        threads = str(self.record["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with log.open("a") as errors, self.lock:
            if self.stopped:
                return
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process, which tells the workers once
            )
            self.running.add(process)
        assert process.stdout is not None
        ended = False
        for line in process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                message = json.loads(line)
                ended |= message["event"] == "done"
                getattr(self.tell, message.pop("event"))(key, **message)
        code = process.wait()
        with self.lock:
            self.running.discard(process)
        if not ended and not self.stopped:
            self._died(own, key, code, log)

    def _died(self, own: Path, key: str, code: int, log: Path) -> None:
        """A worker that could not say how it ended: killed, out of memory, out of disk."""
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        message = f"the worker process ended with {cause}" + (f": {lines[-1]}" if lines else "")
        if own.parent.name == "trainings":
            task, model, seed = key.rsplit(".", 2)
            known = {"key": key, "task": task, "model": model, "seed": int(seed.removeprefix("seed"))}
            write_json(own / RECORD, {**known, "status": "failed", "message": message})
        self.tell.done(key, "failed", message)

    def stop(self) -> None:
        """Tell every worker to save and end, and wait for it."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.send_signal(signal.SIGINT)


def _spec(experiment: ExperimentSpec | dict[str, Any] | str | Path) -> ExperimentSpec:
    if isinstance(experiment, ExperimentSpec):
        return experiment
    if isinstance(experiment, str | Path):
        return load_recipe(experiment)
    return ExperimentSpec.parse(experiment)


def _folder(spec: ExperimentSpec, out: str | Path | None, resume: bool) -> Path:
    """The run's folder. A folder that is taken is never written over."""
    if out is None:
        base = Path("runs")
        taken = [p for p in [base / spec.name, *(base / f"{spec.name}-{i}" for i in range(2, 10_000))] if p.exists()]
        if resume:
            unfinished = [p for p in taken if _status(p) not in (None, "finished")]
            if not unfinished:
                raise InputError(
                    f"{base / spec.name}: there is no unfinished run to resume; start one without --resume"
                )
            return unfinished[-1]
        return base / (spec.name if not taken else f"{spec.name}-{_next_number(base, spec.name)}")
    folder = Path(out)
    status = _status(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for the run")
    if status is None:
        if folder.is_dir() and any(p.name != ".lock" for p in folder.iterdir()):
            raise InputError(f"{folder}: holds files that are no run; choose an empty or new folder with --out")
        if resume:
            raise InputError(f"{folder}: there is no run to resume; start one without --resume")
    elif status == "finished":
        raise InputError(f"{folder}: holds a finished run, which is not written over; choose another folder with --out")
    elif not resume:
        raise InputError(f"{folder}: holds an unfinished run ({status}); go on with --resume, or choose another --out")
    return folder


def _next_number(base: Path, name: str) -> int:
    number = 2
    while (base / f"{name}-{number}").exists():
        number += 1
    return number


def _status(folder: Path) -> str | None:
    return str(read_json(folder / RECORD).get("status")) if (folder / RECORD).exists() else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the same run."""
    make_folder(folder)
    try:
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise ResourceError(f"cannot write {folder}: {error.strerror}; choose another folder with --out") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another process is working on this run; wait for it to end") from None
        yield


def _open(
    folder: Path, spec: ExperimentSpec, device: torch.device, resume: bool, jobs: int | None, plugins: Sequence[str]
) -> dict[str, Any]:
    """The run's record: a new one, or that of the run that is resumed (with its jobs and threads: same rounding)."""
    if resume:
        before = ExperimentSpec.parse(read_yaml(folder / SPEC), str(folder / SPEC))
        if before != spec:
            raise InputError(
                f"{folder}: the run there was started with another spec (see {folder / SPEC}); "
                f"resume it with: contextlab run {folder} --resume"
            )
        record = read_json(folder / RECORD)
        if record["device"] != device.type:
            raise InputError(
                f"{folder}: the run was started on {record['device']}; resume with --device {record['device']}"
            )
        return record
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = len(spec.trainings())
    at_once = min(jobs or (cores if device.type == "cpu" else 1), count)
    write_atomic(folder / SPEC, yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    return {
        "name": spec.name,
        "description": spec.description,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "jobs": at_once,
        "threads": max(1, cores // at_once) if at_once > 1 else torch.get_num_threads(),
        "plugins": [str(Path(p).resolve()) if p.endswith(".py") else p for p in plugins],
        **machine_record(),
    }


def _jobs(folder: Path, spec: ExperimentSpec) -> list[str]:
    """What is left to do, trainings first."""
    keys = []
    for training in spec.trainings():
        path = folder / "trainings" / training.key / RECORD
        if not path.exists() or read_json(path)["status"] not in FINAL:
            keys.append(training.key)
    keys += [f"learners.{name}" for name in spec.tasks if not (folder / "learners" / f"{name}.parquet").exists()]
    return keys


def _compress_jobs(folder: Path, spec: ExperimentSpec) -> list[str]:
    """What is left of the measurements under policies; they follow the trainings."""
    if spec.compress is None:
        return []
    names = [f"{spec.compress.model}.seed{seed}" for seed in spec.seeds]
    return [f"compress.{name}" for name in names if not (folder / "compress" / f"{name}.parquet").exists()]


def _close(folder: Path, spec: ExperimentSpec, record: dict[str, Any]) -> Run:
    """Put the jobs' results together, write the report, and say how the run ended."""
    trained = [folder / "trainings" / training.key / RESULTS for training in spec.trainings()]  # in the recipe's order
    paths = [p for p in [*trained, *(folder / "learners" / f"{name}.parquet" for name in spec.tasks)] if p.exists()]
    if not paths:
        _write_record(folder, record, status="failed")
        first = next((r["message"] for r in _training_records(folder, spec) if r.get("message")), "no job gave results")
        raise ResourceError(f"{folder}: no training gave results; the first said: {first}")
    found = Measured.read(paths)
    found.write(folder / RESULTS)
    records = _training_records(folder, spec)
    missing = [name for name in spec.tasks if not (folder / "learners" / f"{name}.parquet").exists()]
    whole = all(r["status"] in FINAL for r in records) and not missing and not _compress_jobs(folder, spec)
    compressed = _close_compressed(folder)
    _write_record(folder, record, status="finished" if whole else "failed")
    build_report(
        found.results,
        records,
        [record],
        [yaml.safe_load((folder / SPEC).read_text())],
        folder / REPORT,
        facets=found.facets,
        similarity=found.similarity,
        compressed={spec.name: compressed},
    )
    return Run(folder, found.results, records, record, found.facets, found.similarity, compressed)


def _close_compressed(folder: Path) -> pd.DataFrame:
    """Put the seeds' measurements under policies together and write their page; empty where there are none."""
    paths = sorted(folder.glob("compress/*.parquet"))
    if not paths:
        return pd.DataFrame()
    found = pd.concat([read_results(path) for path in paths], ignore_index=True)
    write_results(found, folder / COMPRESSED)
    lines = [line for path in sorted(folder.glob("compress/*.left_out.json")) for line in read_json(path)]
    left_out = {line.partition(": ")[0]: line for line in lines}  # each setting once, whatever the seeds
    write_compress_page(found, folder / COMPRESS_PAGE, left_out=list(left_out.values()))
    return found


def _training_records(folder: Path, spec: ExperimentSpec) -> list[dict[str, Any]]:
    return [read_json(folder / "trainings" / t.key / RECORD) for t in spec.trainings()]


def _write_record(folder: Path, record: dict[str, Any], *, status: str) -> None:
    record["status"] = status
    record["ended" if status != "running" else "resumed"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / RECORD, record)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _traceback() -> str:
    import traceback

    return traceback.format_exc()
