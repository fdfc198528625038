"""Experiment trackers: what a run tells while it works, sent to TensorBoard, Weights & Biases, Trackio or MLflow too.

Each job is a run of the tracker: the spec of its training as config, its loss as a curve, at the end the means of what
was measured. The run's folder stays the truth: a tracker is only told, and one that fails is left, with a warning.
Measurements under policies are not sent.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from contextlab.errors import InputError, ResourceError, first_line, unknown
from contextlab.evaluation import read_results
from contextlab.experiments.folder import TRAINED, RunFolder, read_run_record
from contextlab.experiments.jobs import Job, all_jobs, swept
from contextlab.experiments.progress import Progress
from contextlab.experiments.spec import ExperimentSpec

WELL = ("finished", "paused")
"""Statuses of a job that nothing went wrong with."""


class Sink(Protocol):
    """One job's run in a tracker. Values are finite or NaN; steps only grow, but for a training that is resumed."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step."""

    def end(self, step: int, values: Mapping[str, float], status: str) -> None:
        """What was measured, and how the job ended: "finished", "paused" (a trial at a rung), "diverged",
        "interrupted" or "failed"."""


class _TensorBoard:
    """Event files under <run's folder>/tensorboard/<key>; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, name: str, group: str, identity: str, config: Mapping[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard" / name))
        lines = "\n".join(f"    {key}: {value}" for key, value in config.items())  # an indented block of Markdown
        self.writer.add_text("config", lines, 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def end(self, step: int, values: Mapping[str, float], status: str) -> None:
        self.log(step, values)
        self.writer.add_text("status", status, step)
        self.writer.close()


class _Wandb:
    """A run of Weights & Biases, in the project of the experiment's name; offline with WANDB_MODE=offline."""

    def __init__(self, name: str, group: str, identity: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)
        self.run = wandb.init(
            project=group.partition("/")[0], group=group, name=name, id=identity, config=dict(config), dir=str(folder),
            resume="allow", reinit="create_new", settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def end(self, step: int, values: Mapping[str, float], status: str) -> None:
        self.run.summary.update({**values, "status": status})
        self.run.finish(exit_code=0 if status in WELL else 1)


class _Trackio:
    """A run of Trackio, in the project of the experiment's name; `trackio show` shows it, TRACKIO_DIR says where."""

    def __init__(self, name: str, group: str, identity: str, config: Mapping[str, Any], folder: Path) -> None:
        import trackio

        self.run = trackio.init(
            project=group.partition("/")[0], group=group, name=f"{name}-{identity[:6]}", config=dict(config),
            resume="allow", embed=False,
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def end(self, step: int, values: Mapping[str, float], status: str) -> None:
        if values:
            self.run.log(dict(values), step=step)
        self.run.finish()


class _MLflow:
    """A run of MLflow, in the experiment of the same name, at MLFLOW_TRACKING_URI or MLflow's own default."""

    STATUS: Mapping[str, str] = {**dict.fromkeys(WELL, "FINISHED"), "interrupted": "KILLED"}

    def __init__(self, name: str, group: str, identity: str, config: Mapping[str, Any], folder: Path) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        project = group.partition("/")[0]
        found = self.client.get_experiment_by_name(project)
        at = found.experiment_id if found else self.client.create_experiment(project)
        before = self.client.search_runs([at], f"tags.`contextlab.id` = '{identity}'")
        if before:
            self.id = before[0].info.run_id
            self.client.update_run(self.id, "RUNNING")
            return
        tags = {"contextlab.id": identity, "contextlab.run": group}
        self.id = self.client.create_run(at, run_name=name, tags=tags).info.run_id
        for key, value in config.items():
            self.client.log_param(self.id, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.client.log_metric(self.id, key, value, step=step)

    def end(self, step: int, values: Mapping[str, float], status: str) -> None:
        self.log(step, values)
        self.client.set_terminated(self.id, self.STATUS.get(status, "FAILED"))


TRACKERS: dict[str, Callable[..., Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}
"""Trackers by the name of their package, which is the name of the extra that installs them."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise InputError where a tracker is not known, and ResourceError where its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(unknown("tracker", name, TRACKERS))
        if find_spec(name) is None:
            raise ResourceError(
                f"tracker {name!r}: the package {name} is not installed; pip install 'contextlab[{name}]'"
            )


class Tracked:
    """A Progress that tells trackers what it tells another.

    tell: the other.
    names: of trackers; see `TRACKERS`.
    folder, spec, record: of the run.

    As a context manager it ends what was begun. Jobs that run at once may call it from several threads.
    """

    def __init__(
        self, tell: Progress, names: Sequence[str], folder: RunFolder, spec: ExperimentSpec, record: Mapping[str, Any]
    ) -> None:
        self.tell, self.folder, self.spec, self.record = tell, folder, spec, record
        self.names = list(dict.fromkeys(names))  # one that is named twice is told once
        self.jobs = {job.key: job for job in all_jobs(spec) if job.kind not in ("compress", "inspect")} if names else {}
        self.open: dict[str, dict[str, Sink]] = {}
        self.steps: dict[str, int] = {}
        self.lock = threading.RLock()

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *error: object) -> None:
        for key in list(self.open):
            self._end(key, "interrupted")

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        self.tell.update(key, step, steps, loss)
        if key in self.jobs:
            self.steps[key] = step
            self._each(key, lambda sink: sink.log(step, {"loss": loss}))

    def phase(self, key: str, text: str) -> None:
        self.tell.phase(key, text)
        if key in self.jobs:
            self._each(key, lambda sink: None)

    def done(self, key: str, status: str, message: str) -> None:
        self.tell.done(key, status, message)
        if key in self.jobs:
            self._end(key, status)

    def _end(self, key: str, status: str) -> None:
        values = _measured(self.folder, self.jobs[key]) if status in WELL else {}
        self._each(key, lambda sink: sink.end(self.steps.get(key, 0), values, status))
        self.open.pop(key, None)

    def _each(self, key: str, do: Callable[[Sink], None]) -> None:
        with self.lock:
            for name in list(self.names):
                try:
                    sinks = self.open.setdefault(key, {})
                    if name not in sinks:
                        sinks[name] = self._begin(name, self.jobs[key])
                    do(sinks[name])
                except Exception as error:  # whatever a service or its library raises: the run does not need it
                    self.names.remove(name)
                    warnings.warn(
                        f"{name} is told no more: {type(error).__name__}: {first_line(error)}; the run goes on, and "
                        "its folder holds all",
                        stacklevel=2,
                    )

    def _begin(self, name: str, job: Job) -> Sink:
        digest = hashlib.sha256(f"{self.record['started']} {self.folder.path.name} {job.key}".encode())
        return TRACKERS[name](
            name=job.key,
            group=f"{self.spec.name}/{self.folder.path.name}",
            identity=digest.hexdigest()[:16],
            config=_config(self.spec, job),
            folder=self.folder.path,
        )


def _config(spec: ExperimentSpec, job: Job) -> dict[str, Any]:
    """What makes the job what it is: keys with dots -> numbers, words, or None."""
    found: dict[str, Any] = {"kind": job.kind, "task": job.task, "model": job.model, "seed": job.seed}
    chosen_later = job.kind == "training" and swept(spec, job)  # the trials tell theirs
    if job.kind in TRAINED and not chosen_later:
        training = spec.training(job)
        found |= {} if job.trial is None else {"trial": job.trial}
        found |= _leaves("model", training.model.model_dump(mode="json", exclude_defaults=True))
        found |= _leaves("train", training.train.model_dump(mode="json"))
    return found


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: each for part, inner in value.items() for key, each in _leaves(f"{name}.{part}", inner).items()}
    return {name: value if value is None or isinstance(value, bool | int | float | str) else str(value)}


def _measured(folder: RunFolder, job: Job) -> dict[str, float]:
    """The means over all that is scored: "SPLIT/METRIC" -> value, with the task before it where there are several,
    and with the learner before it; of a trial "validation/METRIC"."""
    if job.kind == "trial":
        record = read_run_record(folder.job_record(job))
        at_rung: Mapping[str, Any] = next((each["validation"] for each in reversed(record.get("rungs") or ())), {})
        scores = record.get("validation", at_rung).items()
        of_task = {task: f"{task}/validation" if len(scores) > 1 else "validation" for task, _ in scores}
        return {
            f"{of_task[task]}/{score['metric']}": score["value"] for task, score in scores if score["value"] is not None
        }
    table = read_results(folder.table(job))
    table = table[table["shot"].isna() & table["value"].notna()]
    several = table["task"].nunique() > 1
    names = table["split"] + "/" + table["metric"]
    if several:
        names = table["task"] + "/" + names
    if job.kind == "learners":
        names = table["model"] + "/" + names
    return {str(name): float(value) for name, value in zip(names, table["value"], strict=True)}
