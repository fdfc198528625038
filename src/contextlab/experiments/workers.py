"""Jobs of a run in processes of their own, several at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from contextlab.experiments.folder import RunFolder, read_run_record
from contextlab.experiments.jobs import Job
from contextlab.experiments.progress import Progress
from contextlab.experiments.spec import ExperimentSpec
from contextlab.files import make_folder, write_record


def run_workers(
    folder: RunFolder,
    spec: ExperimentSpec,
    todo: Sequence[Job],
    record: dict[str, Any],
    tell: Progress,
    training: bool = True,
) -> None:
    """Do the jobs in worker processes, `record["jobs"]` at once; see `work.do_job`."""
    workers = _Workers(folder, spec, record, tell, training)
    with ThreadPoolExecutor(record["jobs"]) as pool:
        pending: set[Future[None]] = {pool.submit(workers.run, job) for job in todo}
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

    def __init__(
        self, folder: RunFolder, spec: ExperimentSpec, record: dict[str, Any], tell: Progress, training: bool
    ) -> None:
        self.folder, self.spec, self.tell, self.threads = folder, spec, tell, record["threads"]
        self.order = {
            "folder": str(folder),
            "spec": spec.model_dump(mode="json", exclude_unset=True),
            "training": training,
            **{name: record[name] for name in ("device", "threads", "plugins")},
        }
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, job: Job) -> None:
        log = self.folder.log(job)
        make_folder(log.parent)
        command = [sys.executable, "-m", "contextlab.experiments.worker", job.key]  # the key is for `ps` only
        threads = str(self.threads)
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
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # one that has died already; its end is seen below
            process.stdin.write(json.dumps({**self.order, "job": dataclasses.asdict(job)}) + "\n")
            process.stdin.flush()
        ended = False
        for line in process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                message = json.loads(line)
                ended |= message["event"] == "done"
                getattr(self.tell, message.pop("event"))(job.key, **message)
        code = process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        with self.lock:
            self.running.discard(process)
        if not ended and not self.stopped:
            self._died(job, code)

    def _died(self, job: Job, code: int) -> None:
        """A worker that could not say how it ended: killed, out of memory, out of disk."""
        path = self.folder.job_record(job)
        before = read_run_record(path) if path.exists() else {}
        if self.folder.done(job, self.spec):  # it had done its work by then
            self.tell.done(job.key, before.get("status", "finished"), "")
            return
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line for line in self.folder.log(job).read_text(errors="replace").splitlines() if line.strip()]
        message = f"the worker process ended with {cause}" + (f": {lines[-1]}" if lines else "")
        write_record(path, {**before, **job.fields, "status": "failed", "message": message})
        self.tell.done(job.key, "failed", message)

    def stop(self) -> None:
        """Tell every worker to save and end, and wait for it."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.send_signal(signal.SIGTERM)
