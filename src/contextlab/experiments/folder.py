"""A run's folder: where things lie, who may work in it, and which jobs are done.

experiment.yaml             the ExperimentSpec, to run it again
record.json                 status, versions, machine, backends, device, threads, the files there are
trainings/<key>/            checkpoints, record.json, log.txt and the tables of one training
trials/<key>/               of a sweep: checkpoints, until the best is chosen, record.json and log.txt of one trial
sweep.parquet               all trials' scores, tidy
learners/<task>.parquet     results of the task's learners, <task>.facets.parquet and <task>.record.json
results.parquet             all measurements, tidy
facets.parquet              errors by facets of the predictions, such as the distance of the fact
similarity.parquet          how alike models' predictions are to learners'
by_prompt.parquet           the value of each prompt, by which differences are paired
compress/                   tables of what a model loses under policies, one a seed, and what was left out
compress.parquet            these together, and compress.html, where the recipe asks for it
inspect/                    tables of what probes found, one a task, model and seed, and what was left out
inspect.parquet             these together, and inspect.html, where the recipe asks for it
report.html                 the report
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contextlab.errors import InputError
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.experiments.jobs import Job, all_jobs, chosen_jobs
from contextlab.experiments.spec import ExperimentSpec
from contextlab.files import file_digest, locked, make_folder, read_record
from contextlab.training.checkpoint import newest

FINAL = ("finished", "diverged")
"""How a training can have ended so that there is nothing left to do of it."""
HALVED = ("dropped", "chosen")
"""How a trial can have ended by halving: it is trained no further, or by the job that measures it."""
TRAINED = ("training", "trial")
"""Kinds of jobs that have a folder of their own, for checkpoints."""
SPEC, RECORD, RESULTS, REPORT = "experiment.yaml", "record.json", "results.parquet", "report.html"
SWEEP = "sweep.parquet"
COMPRESSED, COMPRESS_PAGE = "compress.parquet", "compress.html"
INSPECTED, INSPECT_PAGE = "inspect.parquet", "inspect.html"
LOCK = ".lock"
STATUS: Mapping[str, type] = {"status": str}
OF_RUN: Mapping[str, type] = {**STATUS, "name": str, "device": str, "jobs": int, "threads": int}
OF_TRAINING: Mapping[str, type] = {**STATUS, "key": str, "task": str, "model": str, "seed": int}
"""What a record must hold to be worked with: any; that of a run; that of a training."""
HALF_WRITTEN = re.compile(r"\.[A-Za-z0-9][\w.+-]{0,39}\.[0-9a-f]{12}")
"""Names of what a process that was killed while it wrote leaves behind (`files.write_atomic`)."""


class RunFolder:
    """The places of a run's files. Nothing is written by making one.

    path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.spec, self.record = self.path / SPEC, self.path / RECORD
        self.results, self.report = self.path / RESULTS, self.path / REPORT
        self.sweep = self.path / SWEEP
        self.compressed, self.compress_page = self.path / COMPRESSED, self.path / COMPRESS_PAGE
        self.inspected, self.inspect_page = self.path / INSPECTED, self.path / INSPECT_PAGE

    def __str__(self) -> str:
        return str(self.path)

    def training(self, job: Job) -> Path:
        """The folder of a training, or of a trial."""
        return self.path / ("trials" if job.kind == "trial" else "trainings") / job.key

    def table(self, job: Job) -> Path:
        """Where the job's results lie, once they are whole; of a trial nothing does."""
        if job.kind in TRAINED:
            return self.training(job) / RESULTS
        return self._beside(job, "parquet")

    def left_out(self, job: Job) -> Path:
        """What policies did not allow, in a job of kind "compress", or where probes could not serve, in "inspect"."""
        return self._beside(job, "left_out.json")

    def job_record(self, job: Job) -> Path:
        """Where the job's record lies, once it has ended in any way."""
        return self.training(job) / RECORD if job.kind in TRAINED else self._beside(job, RECORD)

    def lock(self, job: Job) -> Path:
        """The file that whoever does the job holds locked."""
        record = self.job_record(job)
        return record.with_name(LOCK if job.kind in TRAINED else f".{record.name.removesuffix(RECORD)}lock")

    def log(self, job: Job) -> Path:
        """What the job's process wrote as errors."""
        return self.training(job) / "log.txt" if job.kind in TRAINED else self._beside(job, "log.txt")

    def _beside(self, job: Job, end: str) -> Path:
        name = job.task if job.kind == "learners" else f"{job.model}.seed{job.seed}"
        name = f"{job.task}.{name}" if job.kind == "inspect" else name
        return self.path / job.kind / f"{name}.{end}"

    def status(self) -> str | None:
        """How far the run is; None where there is no record of one."""
        return str(read_run_record(self.record)["status"]) if self.record.exists() else None

    def done(self, job: Job, spec: ExperimentSpec) -> bool:
        """Whether nothing is left to do of the job: it ended, with this evaluation, and all that it wrote is there.

        Raises InputError when a file of a job that is done has changed since.
        """
        if not self.job_record(job).exists():
            return False
        record = read_run_record(self.job_record(job))
        if not self.all_there(record):
            return False
        if job.kind == "trial":
            return self.tried(job, record, spec)
        if job.kind == "training":
            ended = record["status"] in FINAL and newest(self.training(job)) is not None
            if not ended or record["status"] == "diverged":
                return ended
        elif record["status"] != "finished":
            return False
        wanted = evaluations(job, spec)
        if not self.table(job).exists() or record.get("evaluate_spec", wanted) != wanted:
            return False
        self.require_unchanged(record)
        return True

    @staticmethod
    def tried(job: Job, record: Mapping[str, Any], spec: ExperimentSpec) -> bool:
        """Whether nothing is left to do of a trial, by its record: up to its rung, if the job is for one."""
        if job.rung is not None and len(record.get("rungs") or ()) > job.rung:
            return True
        return record.get("status") in FINAL or (
            job.rung is None and record.get("status") in HALVED and spec.halving_of(job.model) is not None
        )

    def whole(self, spec: ExperimentSpec) -> bool:
        """Whether all files of a run that has finished are there. Raises InputError when one has changed since."""
        pages = [self.results, self.report] + ([self.compressed, self.compress_page] if spec.compress else [])
        pages += [self.inspected, self.inspect_page] if spec.inspect else []
        pages += [self.sweep] if chosen_jobs(spec) else []
        record = read_run_record(self.record)
        if not (all(path.exists() for path in pages) and self.all_there(record)):
            return False
        self.require_unchanged(record)
        return all(self.done(job, spec) for job in all_jobs(spec))

    def checksums(self, paths: Iterable[Path]) -> dict[str, str]:
        """Files of the run as its records name them: path in the run's folder -> SHA-256."""
        return {str(path.relative_to(self.path)): file_digest(path) for path in sorted(paths)}

    def all_there(self, record: Mapping[str, Any]) -> bool:
        """Whether the files that a record names exist."""
        return all((self.path / name).exists() for name in record.get("files", ()))

    def require_unchanged(self, record: Mapping[str, Any], end: str = "") -> None:
        """Refuse files that have changed since the record was written; records of older versions have no checksums.

        end: of the names to look at.

        Raises InputError that names the file, and says how it is made again.
        """
        files = record.get("files")
        for name, digest in files.items() if isinstance(files, Mapping) else ():
            path = self.path / name
            if name.endswith(end) and path.exists() and file_digest(path) != digest:
                raise InputError(
                    f"{path}: damaged: it has changed since it was written (its checksum differs); delete it, and "
                    f"contextlab run {self} --resume makes it again"
                )

    def tidy(self) -> None:
        """Remove what processes that were killed while they wrote left behind."""
        for path in self.path.rglob(".*"):
            if HALF_WRITTEN.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)

    def unused(self, spec: ExperimentSpec) -> bool:
        """Whether a new run may begin here: nothing lies here but what one that was killed at once had begun."""
        names = {path.name for path in self.path.iterdir() if not HALF_WRITTEN.fullmatch(path.name)} - {LOCK}
        return not names or (names == {SPEC} and self.spec.is_file() and self.spec.read_bytes() == spec_text(spec))


def evaluations(job: Job, spec: ExperimentSpec) -> dict[str, dict[str, Any]]:
    """What is measured in the job, by task, as plain data; nothing of jobs under policies."""
    found: dict[str, EvaluateSpec] = {}
    if job.kind == "training":
        found = dict(spec.candidates(job)[0].evaluate)
    elif job.kind == "learners":
        found = {job.task: spec.evaluate_spec(job.task)}
    elif job.kind == "inspect" and spec.inspect is not None:
        wanted = spec.inspect
        return {job.task: {"probes": list(wanted.probes), "seed": wanted.seed}}
    return {task: each.model_dump(mode="json") for task, each in found.items()}


def spec_text(spec: ExperimentSpec) -> bytes:
    """What experiment.yaml holds of the spec."""
    import yaml

    return yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True), sort_keys=False).encode()


def read_run_record(path: Path, keys: Mapping[str, type] = STATUS) -> dict[str, Any]:
    """A record of a run or of a job. Raises InputError when the file is damaged, saying what to do.

    keys: that it must hold, each with its type.
    """
    return read_record(path, keys, "delete it, and what it tells of is done again")


def find_folder(spec: ExperimentSpec, out: str | Path | None, resume: bool) -> Iterator[RunFolder]:
    """Folders that the run may take, best first; whoever locks one has it. Nothing is written.

    Raises InputError where there is none: a folder that is taken is never written over.
    """
    if out is None:
        base = Path("runs") / spec.name
        numbered = itertools.chain([base], (Path(f"{base}-{number}") for number in itertools.count(2)))
        if not resume:
            yield from (RunFolder(p) for p in numbered if not p.exists() or (p.is_dir() and RunFolder(p).unused(spec)))
            return
        there = [RunFolder(path) for path in itertools.takewhile(Path.exists, numbered) if path.is_dir()]
        begun = [each for each in there if each.spec.exists()]
        for each in reversed(begun):
            if each.status() != "finished" or not each.whole(spec):
                yield each
                return
        raise InputError(f"{base}: there is no unfinished run to resume; start one without --resume")
    folder = RunFolder(out)
    if folder.path.exists() and not folder.path.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for the run")
    status = folder.status()
    if resume:
        if status is None and not folder.spec.exists():
            raise InputError(f"{folder}: there is no run to resume; start one without --resume")
    elif status == "finished":
        raise InputError(f"{folder}: holds a finished run, which is not overwritten; choose another folder with --out")
    elif status is not None:
        raise InputError(f"{folder}: holds an unfinished run ({status}); go on with --resume, or choose another --out")
    elif folder.path.is_dir() and not folder.unused(spec):
        raise InputError(f"{folder}: holds files but no run; choose an empty or new folder with --out")
    yield folder


@contextlib.contextmanager
def claimed(spec: ExperimentSpec, out: str | Path | None, resume: bool) -> Iterator[RunFolder]:
    """The run's folder, for this process alone: of several that ask at once each gets another."""
    for folder in find_folder(spec, out, resume):
        with _lock(folder) as got:
            if got and (resume or (folder.status() is None and folder.unused(spec))):
                yield folder
                return
        if out is not None or resume:
            break
    raise _busy(folder)


@contextlib.contextmanager
def exclusive(folder: RunFolder) -> Iterator[None]:
    """Keep other processes out of a run that exists."""
    with _lock(folder) as got:
        if not got:
            raise _busy(folder)
        yield


@contextlib.contextmanager
def _lock(folder: RunFolder) -> Iterator[bool]:
    make_folder(folder.path)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder.path / LOCK, wait=False))
        except BlockingIOError:
            yield False
        else:
            yield True


def _busy(folder: RunFolder) -> InputError:
    return InputError(f"{folder}: another process is working on this run; wait for it to end")
