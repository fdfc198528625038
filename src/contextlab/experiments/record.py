"""The record of a run: begun, gone on with, and what may differ then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from contextlab.errors import InputError
from contextlab.evaluation.machine import machine_record
from contextlab.experiments.folder import OF_RUN, RunFolder, evaluations, read_run_record, spec_text
from contextlab.experiments.jobs import measuring_jobs
from contextlab.experiments.recipes import read_yaml
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.starts import require_same_sources, sources
from contextlab.files import write_atomic, write_record
from contextlab.plugins import plugin_options


def begin(
    folder: RunFolder,
    spec: ExperimentSpec,
    device: torch.device,
    jobs: int | None,
    threads: int | None,
    plugins: Sequence[str],
) -> dict[str, Any]:
    """Write the spec and the record of a new run. Returns the record."""
    at_once, each = shares(most_at_once(spec), device, jobs, threads)
    record = {
        "name": spec.name,
        "description": spec.description,
        "status": "running",
        "started": _now(),
        "device": device.type,
        "jobs": at_once,
        "threads": each,
        "plugins": plugin_names(plugins),
        **machine_record(),
    }
    if starts := sources(spec.trainings()):
        record["sources"] = starts
    write_atomic(folder.spec, spec_text(spec))
    write_status(folder, record, "running")
    return record


def go_on(
    folder: RunFolder,
    spec: ExperimentSpec,
    device: torch.device,
    jobs: int | None,
    threads: int | None,
    plugins: Sequence[str],
) -> dict[str, Any]:
    """The record of the run that is resumed; what is measured may differ from what was asked for before.

    It goes on with as many threads as it was begun with, whatever `jobs`: then its results are those of a run that was
    never stopped. Raises InputError when the run is of another spec or device, or needs plugins that are not named.
    """
    if folder.status() is None:  # it was killed before there was a record
        _change_spec(folder, spec)
        return begin(folder, spec, device, jobs, threads, plugins)
    record = read_run_record(folder.record, OF_RUN)
    if record["device"] != device.type:
        raise InputError(
            f"{folder}: the run was started on {record['device']}; resume with --device {record['device']}"
        )
    starts = sources(spec.trainings())
    require_same_sources(folder, record.get("sources"), starts)
    _change_spec(folder, spec)
    if starts:
        record["sources"] = {**record.get("sources", {}), **starts}
    at_once = record["jobs"] if jobs is None else shares(most_at_once(spec), device, jobs, threads)[0]
    record |= {"jobs": at_once, "threads": threads or record["threads"], "plugins": plugin_names(plugins)}
    return record


def most_at_once(spec: ExperimentSpec) -> int:
    """How many trainings can go on at once: trials, or the seeds that are trained at the chosen setting."""
    return max(len(spec.trainings()), len(spec.measured()))


def shares(trainings: int, device: torch.device, jobs: int | None, threads: int | None) -> tuple[int, int]:
    """Jobs at once, and the threads of each: the cores are shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = min(jobs or (cores if device.type == "cpu" else 1), trainings)
    own = torch.get_num_threads()
    return at_once, threads or (max(1, min(own, cores // at_once)) if at_once > 1 else own)


def require_plugins(folder: RunFolder, plugins: Sequence[str]) -> None:
    """Refuse to go on without the plugins that a run was begun with: they are imported only when named again."""
    if not folder.record.exists():
        return
    recorded = [str(each) for each in read_run_record(folder.record).get("plugins") or ()]
    missing = [each for each in recorded if each not in plugin_names(plugins)]
    if missing:
        raise InputError(
            f"{folder}: the run was started with {len(recorded)} plugin{'s' if len(recorded) > 1 else ''}, and plugins "
            f"are imported only when they are named; add{plugin_options(recorded)}"
        )


def plugin_names(plugins: Sequence[str]) -> list[str]:
    """Plugins as records name them: files by their whole path."""
    return [str(Path(each).resolve()) if each.endswith(".py") else each for each in plugins]


def write_status(folder: RunFolder, record: dict[str, Any], status: str) -> None:
    """Write the run's record with this status, and when it came to it."""
    record["status"] = status
    if status == "running":
        record.pop("files", None)  # from here on they may be replaced
    record["ended" if status != "running" else "resumed"] = _now()
    write_record(folder.record, record)


def change_evaluation(folder: RunFolder, before: ExperimentSpec, spec: ExperimentSpec) -> None:
    """Make `spec` the run's, which differs from the spec before in what is measured alone.

    What was measured so far keeps the evaluation that it was measured with, so that it is known what to measure again.
    """
    for job in measuring_jobs(before):
        path = folder.job_record(job)
        if not path.exists() and not folder.table(job).exists():
            continue
        record = read_run_record(path) if path.exists() else {**job.fields, "status": "finished", "message": ""}
        if "evaluate_spec" not in record:  # runs of older versions
            write_record(path, {**record, "evaluate_spec": evaluations(job, before)})
    write_atomic(folder.spec, spec_text(spec))


def differs_in_evaluation_only(before: ExperimentSpec, spec: ExperimentSpec) -> bool:
    """Whether two specs train the same."""

    def rest(each: ExperimentSpec) -> dict[str, Any]:
        data = each.model_dump(mode="json", exclude={"evaluate": True, "tasks": {"__all__": {"evaluate"}}})
        return {**data, "tasks": {name: dict(task) for name, task in data["tasks"].items()}}

    return rest(before) == rest(spec)


def _change_spec(folder: RunFolder, spec: ExperimentSpec) -> None:
    if folder.spec.read_bytes() == spec_text(spec):
        return
    before = ExperimentSpec.parse(read_yaml(folder.spec), str(folder.spec))
    if before == spec:
        return
    if not differs_in_evaluation_only(before, spec):
        raise InputError(
            f"{folder}: the run there was started with another spec (see {folder.spec}); only evaluate may differ; "
            f"resume it with: contextlab run {folder} --resume"
        )
    change_evaluation(folder, before, spec)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
