"""Jobs of a run as tasks of a Ray cluster; the run's folder is on storage that all of its nodes see.

A task does what a worker process does (`work.do_job`): it holds the job's lock, goes on from the newest checkpoint, and
leaves its tables and record in the folder. So whatever is killed, a task, a node or the driver, nothing is lost and
nothing that is done is done again: Ray starts a task again elsewhere, and a run whose driver died is resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Sequence
from typing import Any

import torch

from contextlab.errors import ContextlabError, InputError, ResourceError, first_line, unknown
from contextlab.experiments.folder import RunFolder, read_run_record
from contextlab.experiments.jobs import Job
from contextlab.experiments.progress import Progress, Throttled
from contextlab.experiments.sampling import settle
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.work import do_job
from contextlab.experiments.workers import record_death
from contextlab.memory import plain_memory_errors
from contextlab.plugins import load_plugins

TRIES = 4
"""Of a task whose process or node dies, in all."""
WAIT = 0.2
"""Seconds between looks at what tasks tell."""


def ray_address(on: str | None) -> str | None:
    """ "ray" -> "", "ray:auto" -> "auto"; None -> None. Raises InputError for another engine, and ResourceError where
    Ray is not installed."""
    if on is None:
        return None
    engine, _, address = on.partition(":")
    if engine != "ray":
        raise InputError(f"--on: {unknown('engine', engine, ['ray'])}")
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ResourceError("--on ray: the package ray is not installed; pip install 'contextlab[ray]'") from None
    return address


class RayTeam:
    """A Ray cluster that does a run's jobs, as many at once as it has room for.

    record: of the run; each job takes as many CPUs as its "threads", and a GPU where its "device" is "cuda".
    address: of the cluster; "" starts one on this machine, or takes the one that this process is connected to.

    Raises ResourceError when there is no cluster at the address, or no node that a job fits on.
    """

    def __init__(
        self, folder: RunFolder, spec: ExperimentSpec, record: dict[str, Any], tell: Progress, training: bool,
        address: str,
    ) -> None:  # fmt: skip
        self.folder, self.spec, self.record, self.tell, self.address = folder, spec, record, tell, address
        self.common = {
            "folder": str(folder.path.resolve()),
            "spec": spec.model_dump(mode="json", exclude_unset=True),
            "training": training,
            **{name: record[name] for name in ("device", "threads", "plugins", "started")},
        }
        self.began = False

    def __enter__(self) -> RayTeam:
        import ray
        from ray.util.queue import Queue

        if not ray.is_initialized():
            try:
                ray.init(self.address or None, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # Ray raises many kinds
                raise ResourceError(f"--on ray:{self.address}: no cluster there ({first_line(error)})") from None
            self.began = True
        gpus = 1 if self.record["device"] == "cuda" else 0
        if not any(
            node["Alive"]
            and node["Resources"].get("CPU", 0) >= self.record["threads"]
            and node["Resources"].get("GPU", 0) >= gpus
            for node in ray.nodes()
        ):
            need = f"{self.record['threads']} CPUs" + (" and a GPU" if gpus else "")
            self.__exit__()
            raise ResourceError(f"--on ray: no node of the cluster has {need}, which each job needs; see --threads")
        self.task = ray.remote(num_cpus=self.record["threads"], num_gpus=gpus, max_retries=TRIES - 1)(_do)
        self.told = Queue(actor_options={"num_cpus": 0})
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        if self.began:
            ray.shutdown()

    def do(self, todo: Sequence[Job]) -> None:
        """Do the jobs. KeyboardInterrupt tells those at work to save and end."""
        import ray

        pending = {self.task.remote(self.common, dataclasses.asdict(job), self.told): job for job in todo}
        try:
            while pending:
                ready, _ = ray.wait(list(pending), timeout=WAIT)
                self._hear()
                for each in ready:
                    self._settle(each, pending.pop(each))
        except BaseException:
            for each in pending:
                ray.cancel(each, recursive=False)
            with contextlib.suppress(Exception):
                ray.wait(list(pending), num_returns=len(pending), timeout=60)
            raise

    def _hear(self) -> None:
        """Hand on what tasks have told; a lost queue loses progress only."""
        with contextlib.suppress(Exception):
            for event, key, what in self.told.get_nowait_batch(self.told.qsize()):
                getattr(self.tell, event)(key, **what)

    def _settle(self, reference: Any, job: Job) -> None:
        """Record a job that was lost in all its tries; raise what is the user's to mend."""
        import ray

        try:
            fault = ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = f"its Ray task was lost {TRIES} times: {type(error).__name__}"
            record_death(self.folder, self.spec, job, cause, self.tell)
            return
        if fault is not None:
            raise ResourceError(fault)


def _do(common: dict[str, Any], job: dict[str, Any], queue: Any) -> str | None:
    """The task: do one job that is not done. Returns None, or one line on what is wrong with this node."""
    folder, where = RunFolder(common["folder"]), f"node {socket.gethostname()}"
    if not folder.record.exists() or read_run_record(folder.record).get("started") != common["started"]:
        return f"{where} does not see the run's folder {folder}; choose one on storage that all nodes share, with --out"
    torch.set_num_threads(common["threads"])

    def say(event: str, key: str, what: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # nobody may be listening any more
            queue.put_nowait((event, key, what))

    try:
        load_plugins(common["plugins"])
        spec = ExperimentSpec.parse(common["spec"])
        settle(folder, spec)
        if not folder.done(Job(**job), spec):
            with plain_memory_errors():
                do_job(folder, spec, Job(**job), torch.device(common["device"]), Throttled(say), common["training"])
    except ContextlabError as error:
        return f"{where}: {first_line(error)}"
    return None
