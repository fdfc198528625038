"""The end of a run: the jobs' tables put together, the report, and last of all the record that says how it ended."""

from __future__ import annotations

from typing import Any

import pandas as pd
import yaml

from contextlab.errors import InputError, ResourceError
from contextlab.evaluation import Measured, read_results, write_results
from contextlab.experiments.folder import FINAL, RunFolder, read_run_record
from contextlab.experiments.jobs import Job, all_jobs, compress_jobs
from contextlab.experiments.opened import Run
from contextlab.experiments.record import write_status
from contextlab.experiments.spec import ExperimentSpec
from contextlab.files import read_json
from contextlab.report import build_report, write_compress_page


def close(folder: RunFolder, spec: ExperimentSpec, record: dict[str, Any]) -> Run:
    """Put the jobs' results together, write the report, and say how the run ended.

    Raises ResourceError when no job gave results, and InputError when what one gave is damaged.
    """
    folder.tidy()
    records = {job: _job_record(folder, job) for job in all_jobs(spec)}
    done = [job for job in records if folder.done(job, spec)]
    tables = [folder.table(job) for job in done if job.kind != "compress" and folder.table(job).exists()]
    record["failed"] = [
        {"job": job.key, "message": each.get("message", "")}
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
    except InputError as error:  # a job's table is damaged
        raise InputError(f"{error}; delete it, and contextlab run {folder} --resume makes it again") from None
    found.write(folder.results)
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
        compressed={spec.name: compressed},
    )
    record["files"] = folder.checksums(p for p in folder.path.glob("*.*") if p.suffix in (".parquet", ".html"))
    write_status(folder, record, status)  # last: what it says is there is on disk
    return Run(folder.path, found.results, trainings, record, found.facets, found.similarity, compressed)


def _job_record(folder: RunFolder, job: Job) -> dict[str, Any]:
    path = folder.job_record(job)
    return read_run_record(path) if path.exists() else {}


def _close_compressed(folder: RunFolder, spec: ExperimentSpec, done: list[Job]) -> pd.DataFrame:
    """Put the seeds' measurements under policies together and write their page; empty where there are none."""
    jobs = [job for job in compress_jobs(spec) if job in done]
    if not jobs:
        return pd.DataFrame()
    found = pd.concat([read_results(folder.table(job)) for job in jobs], ignore_index=True)
    write_results(found, folder.compressed)
    paths = [folder.left_out(job) for job in jobs]
    lines = [line for path in paths if path.exists() for line in read_json(path)]
    left_out = {line.partition(": ")[0]: line for line in lines}  # each setting once, whatever the seeds
    write_compress_page(found, folder.compress_page, left_out=list(left_out.values()))
    return found
