"""The end of a run: the jobs' tables put together, the report, and last of all the record that says how it ended."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pandas as pd
import yaml

from contextlab.errors import InputError, ResourceError
from contextlab.evaluation import Measured, write_results
from contextlab.evaluation.results import COMPRESS_COLUMNS, read_compressed
from contextlab.experiments.folder import FINAL, RunFolder, read_run_record
from contextlab.experiments.jobs import Job, all_jobs, chosen_jobs, compress_jobs, inspect_jobs, measuring_jobs
from contextlab.experiments.opened import Run, read_sweep
from contextlab.experiments.record import write_status
from contextlab.experiments.rungs import PAUSED, words
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.trial import let_go
from contextlab.experiments.trials_table import sweep_table
from contextlab.files import read_json, write_atomic
from contextlab.inspect.looking import LeftOut, Looked, read_looked, write_looked
from contextlab.report import build_report, write_compress_page
from contextlab.report.looked import write_looked_page


def close(folder: RunFolder, spec: ExperimentSpec, record: dict[str, Any]) -> Run:
    """Put the jobs' results together, write the report, and say how the run ended.

    Raises ResourceError when no job gave results, and InputError when what one gave is damaged.
    """
    folder.tidy()
    records = {job: _job_record(folder, job) for job in all_jobs(spec)}
    done = {
        job
        for job, each in records.items()
        if (folder.tried(job, each, spec) if job.kind == "trial" else folder.done(job, spec))  # there may be thousands
    }
    let_go(folder, spec, done)
    tables = [folder.table(job) for job in measuring_jobs(spec) if job in done and folder.table(job).exists()]
    record["failed"] = [
        {"job": job.key, "message": _why(each)}
        for job, each in records.items()
        if job not in done and each.get("status") not in FINAL
    ]
    if not tables:
        write_status(folder, record, "failed")
        first = next((each["message"] for each in records.values() if each.get("message")), "no job gave results")
        raise ResourceError(f"{folder}: no training gave results; the first said: {first}")
    try:
        found = Measured.read(tables)
        compressed = _close_compressed(folder, spec, done)
        inspected = _close_inspected(folder, spec, done)
    except InputError as error:  # a job's table is damaged
        raise InputError(f"{error}; delete it, and contextlab run {folder} --resume makes it again") from None
    found.write(folder.results)
    tried = _close_sweep(folder, spec, records)
    trainings = [each for job, each in records.items() if job.kind == "training" and each]
    status = "finished" if len(done) == len(records) else "failed"
    build_report(
        found.results,
        trainings,
        [{**record, "status": status}],
        [yaml.safe_load(folder.spec.read_text())],
        folder.report,
        facets=found.facets,
        similarity=found.similarity,
        by_prompt=found.by_prompt,
        compressed={spec.name: compressed},
        inspected={spec.name: inspected},
    )
    record["files"] = folder.checksums(p for p in folder.path.glob("*.*") if p.suffix in (".parquet", ".html"))
    write_status(folder, record, status)  # last: what it says is there is on disk
    return Run(
        folder.path,
        found.results,
        trainings,
        record,
        found.facets,
        found.similarity,
        compressed,
        tried,
        found.by_prompt,
        inspected,
    )


def _job_record(folder: RunFolder, job: Job) -> dict[str, Any]:
    path = folder.job_record(job)
    return read_run_record(path) if path.exists() else {}


def _why(record: Mapping[str, Any]) -> str:
    """Why a job has not ended, in words: what it said, or that it is still to be done."""
    status, message = record.get("status", "missing"), str(record.get("message", ""))
    if status in PAUSED:
        return words("paused", record["steps"], record["train_spec"]["steps"]) + "; go on with --resume"
    return message


def _close_sweep(folder: RunFolder, spec: ExperimentSpec, records: dict[Job, dict[str, Any]]) -> pd.DataFrame:
    """Put the trials' scores together; empty where nothing is swept."""
    chosen = chosen_jobs(spec)
    if not chosen:
        return pd.DataFrame()
    choice = {job: records[job]["trial"] for job in chosen if "trial" in records[job]}
    found = sweep_table(spec, records.__getitem__, choice)
    buffer = io.BytesIO()
    found.to_parquet(buffer, index=False)
    write_atomic(folder.sweep, buffer.getvalue())
    return read_sweep(folder.sweep)


def _close_compressed(folder: RunFolder, spec: ExperimentSpec, done: set[Job]) -> pd.DataFrame:
    """Put the seeds' measurements under policies together and write their page; empty where there are none."""
    jobs = [job for job in compress_jobs(spec) if job in done]
    if not jobs:
        return pd.DataFrame()
    found = read_compressed([folder.table(job) for job in jobs])
    write_results(found, folder.compressed, COMPRESS_COLUMNS)
    paths = [folder.left_out(job) for job in jobs]
    lines = [line for path in paths if path.exists() for line in read_json(path)]
    left_out = {line.partition(": ")[0]: line for line in lines}  # each setting once, whatever the seeds
    write_compress_page(found, folder.compress_page, left_out=list(left_out.values()))
    return found


def _close_inspected(folder: RunFolder, spec: ExperimentSpec, done: set[Job]) -> pd.DataFrame:
    """Put what probes found together and write its page; empty where nothing was looked at."""
    jobs = [job for job in inspect_jobs(spec) if job in done]
    if not jobs:
        return pd.DataFrame()
    paths = [folder.left_out(job) for job in jobs]
    left_out = [LeftOut(*each) for path in paths if path.exists() for each in read_json(path)]
    found = Looked(read_looked([folder.table(job) for job in jobs]), left_out)
    write_looked(found.table, folder.inspected)
    write_looked_page(found, folder.inspect_page, f"Inside the models of {spec.name}")
    return found.table
