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


class Workers:
    """Worker processes, `record["jobs"]` at once, that do jobs (`work.do_job`), each one after another.

    To import everything takes longer than a small job, so a worker lives as long as this, a context manager.

    They end by themselves when this process dies: their input closes. One that dies takes its own job with it.
    """

    def __init__(
        self, folder: RunFolder, spec: ExperimentSpec, record: dict[str, Any], tell: Progress, training: bool
    ) -> None:
        self.folder, self.spec, self.tell, self.threads = folder, spec, tell, record["threads"]
        self.common = {
            "folder": str(folder),
            "spec": spec.model_dump(mode="json", exclude_unset=True),
            "training": training,
            **{name: record[name] for name in ("device", "threads", "plugins")},
        }
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.idle: list[subprocess.Popen[str]] = []
        self.stopped = False
        self.pool = ThreadPoolExecutor(record["jobs"])

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()
        for process in self.idle:
            self._end(process)

    def do(self, todo: Sequence[Job]) -> None:
        """Do the jobs. What is raised here, such as KeyboardInterrupt, tells those at work to save and end."""
        pending: set[Future[None]] = {self.pool.submit(self._run, job) for job in todo}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for each in finished:
                    each.result()
        except BaseException:
            self._stop()
            for each in pending:
                each.cancel()
            raise

    def _run(self, job: Job) -> None:
        """Do one job in a worker that has nothing to do, or in a new one."""
        make_folder(self.folder.log(job).parent)
        waiting = self._waiting()
        process = waiting or self._start(job)
        if process is None:
            return
        heard = ended = ready = False
        order = {"job": dataclasses.asdict(job), "errors": str(self.folder.log(job))}
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # one that has died already; its end is seen below
            for each in [order] if waiting else [self.common, order]:
                process.stdin.write(json.dumps(each) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            heard = True
            with contextlib.suppress(ValueError, KeyError, TypeError):
                message = json.loads(line)
                event = message.pop("event")
                if ready := event == "ready":
                    break
                ended |= event == "done"
                getattr(self.tell, event)(job.key, **message)
        if ready:
            with self.lock:
                self.idle.append(process)
            return
        code = self._end(process)
        if waiting and not heard:  # it died while it waited
            self._run(job)
        elif not ended and not self.stopped:
            self._died(job, code)

    def _waiting(self) -> subprocess.Popen[str] | None:
        """A worker that waits for a job; None when there is none."""
        with self.lock:
            return self.idle.pop() if self.idle else None

    def _start(self, job: Job) -> subprocess.Popen[str] | None:
        """A new worker, whose errors go to the job's log at first; None once all were told to stop."""
        threads = str(self.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with self.folder.log(job).open("a") as errors, self.lock:
            if self.stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "contextlab.experiments.worker", self.folder.path.name],  # the name is for `ps`
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process, which tells the workers once
            )
            self.running.add(process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> int:
        """Let a worker go that has ended, or that ends as its input closes. Returns its exit code."""
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        code = process.wait()
        with self.lock:
            self.running.discard(process)
        return code

    def _died(self, job: Job, code: int) -> None:
        """A worker that could not say how it ended: killed, out of memory, out of disk."""
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line for line in self.folder.log(job).read_text(errors="replace").splitlines() if line.strip()]
        message = f"the worker process ended with {cause}" + (f": {lines[-1]}" if lines else "")
        record_death(self.folder, self.spec, job, message, self.tell)

    def _stop(self) -> None:
        """Tell every worker that is at work to save and end."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.send_signal(signal.SIGTERM)


def record_death(folder: RunFolder, spec: ExperimentSpec, job: Job, message: str, tell: Progress) -> None:
    """Record that whoever did a job died, unless the job was done by then."""
    path = folder.job_record(job)
    before = read_run_record(path) if path.exists() else {}
    if folder.done(job, spec):
        tell.done(job.key, before.get("status", "finished"), "")
        return
    write_record(path, {**before, **job.fields, "status": "failed", "message": message})
    tell.done(job.key, "failed", message)
