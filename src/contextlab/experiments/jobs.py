"""Job: one piece of a run's work, as a value; what a training is; and the list of an experiment's jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from contextlab.evaluation.spec import EvaluateSpec
from contextlab.models import ModelSpec
from contextlab.prompt import Task
from contextlab.training.spec import TrainSpec

if TYPE_CHECKING:
    from contextlab.experiments.distill import Teaching
    from contextlab.experiments.spec import ExperimentSpec
    from contextlab.experiments.starts import Start


@dataclass(frozen=True)
class Job:
    """One piece of a run's work, which is of one of these kinds:

    "trial": to train a model at one setting of a sweep, up to a rung or its end, and to score it on validation prompts;
    "training": to train a model and measure it, or to measure that of the sweep's best trial;
    "learners": to measure those of a task;
    "compress": to measure what a model loses under policies;
    "inspect": to put probes to a trained model, on one of its tasks.

    task: a task of the experiment, or an entry of `multitask`; "" of policies.
    model: its name in the results; "" of learners.
    seed: of the training; 0 of learners.
    trial: number of the setting, of a trial.
    rung: of a trial that is halved: the rung at which it pauses; None: its end.
    """

    kind: Literal["trial", "training", "learners", "compress", "inspect"]
    task: str = ""
    model: str = ""
    seed: int = 0
    trial: int | None = None
    rung: int | None = None

    @property
    def key(self) -> str:
        """Its name in messages and files, its own in the experiment. It is only written, never read."""
        if self.kind == "learners":
            return f"learners.{self.task}"
        if self.kind == "compress":
            return f"{self.model}.seed{self.seed}.compress"
        if self.kind == "inspect":
            return f"{self.task}.{self.model}.seed{self.seed}.inspect"
        trial = "" if self.trial is None else f".trial{self.trial}"
        return f"{self.task}.{self.model}{trial}.seed{self.seed}"

    @property
    def title(self) -> str:
        """Its name for people: the seed where it is not 0."""
        if self.kind == "learners":
            return f"learners of {self.task}"
        trial = [] if self.trial is None else [f"trial {self.trial}"]
        looked = ["inspect"] if self.kind == "inspect" else []
        parts = [self.task or "policies", self.model, *trial, *looked] + ([f"seed {self.seed}"] if self.seed else [])
        return " / ".join(parts)

    @property
    def fields(self) -> dict[str, Any]:
        """What records say of it."""
        own = {"key": self.key, "kind": self.kind, "task": self.task, "model": self.model, "seed": self.seed}
        return own if self.trial is None else {**own, "trial": self.trial}


@dataclass(frozen=True)
class Training:
    """One model to be trained on one task, or on several, from one seed, everything resolved.

    task_name: of the task, or of the entry of `multitask`.
    model_name: in the results; of a training on several tasks "MODEL+TASK_NAME".
    tasks: name -> task that it is trained and measured on.
    evaluate: name of a task -> what is measured on it.
    start: the trained model that it begins with; None: a fresh one.
    trial, setting: of a sweep: the number of the trial, and its path -> value.
    teaching: the teacher that it learns from; None: the tasks alone.
    """

    task_name: str
    model_name: str
    seed: int
    tasks: Mapping[str, Task]
    model: ModelSpec
    train: TrainSpec
    evaluate: Mapping[str, EvaluateSpec]
    trial: int | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    teaching: Teaching | None = None

    @property
    def job(self) -> Job:
        """The job that it is trained in."""
        if self.trial is None:
            return self.measured
        return Job("trial", self.task_name, self.model_name, self.seed, self.trial)

    @property
    def measured(self) -> Job:
        """The job that it is measured in; of a trial, where it is the best."""
        return Job("training", self.task_name, self.model_name, self.seed)

    @property
    def key(self) -> str:
        """Its folder's name in the run."""
        return self.job.key


def first_jobs(spec: ExperimentSpec) -> list[Job]:
    """What needs nothing else done: trials (up to a first rung), trainings without a sweep, and learners, in order."""
    return [
        job if job.trial is None or spec.halving_of(job.model) is None else replace(job, rung=0)
        for job in _known_jobs(spec)
    ]


def _known_jobs(spec: ExperimentSpec) -> list[Job]:
    known = [each.job for each in spec.trainings() if each.trial is None or not spec.sweep_of(each.model_name).adaptive]
    return known + [Job("learners", task=name) for name in spec.tasks]


def asked_jobs(spec: ExperimentSpec) -> list[Job]:
    """Trials of which each is chosen by the scores of those before it, in order."""
    return [each.job for each in spec.trainings() if each.trial is not None and spec.sweep_of(each.model_name).adaptive]


def chosen_jobs(spec: ExperimentSpec) -> list[Job]:
    """What needs all trials of a sweep: to measure the best one, for each model, task and seed."""
    return [job for job in spec.measured() if swept(spec, job)]


def measuring_jobs(spec: ExperimentSpec) -> list[Job]:
    """What gives results: models that are trained, whatever was tried to find them, and learners."""
    return [*spec.measured(), *(Job("learners", task=name) for name in spec.tasks)]


def swept(spec: ExperimentSpec, job: Job) -> bool:
    """Whether a job of kind "training" measures the best of several trials."""
    return spec.candidates(job)[0].trial is not None


def compress_jobs(spec: ExperimentSpec) -> list[Job]:
    """What needs trained models: measurements under policies, one a seed."""
    if spec.compress is None:
        return []
    return [Job("compress", model=spec.compress.model, seed=seed) for seed in spec.seeds]


def inspect_jobs(spec: ExperimentSpec) -> list[Job]:
    """What needs trained models: probes, for each model, task and seed that the recipe names."""
    wanted = spec.inspect
    if wanted is None:
        return []
    return [
        Job("inspect", task, each.model, each.seed)
        for each in spec.measured()
        if not wanted.models or each.model in wanted.models
        for task in spec.candidates(each)[0].tasks
        if not wanted.tasks or task in wanted.tasks
    ]


def trained_for(spec: ExperimentSpec, job: Job) -> Job:
    """The job of kind "training" whose model a job of kind "inspect" looks into."""
    own = (each for each in spec.measured() if (each.model, each.seed) == (job.model, job.seed))
    return next(each for each in own if job.task in spec.candidates(each)[0].tasks)


def all_jobs(spec: ExperimentSpec) -> list[Job]:
    """All jobs of an experiment, in order; each trial once, however many rungs it has."""
    return _known_jobs(spec) + asked_jobs(spec) + chosen_jobs(spec) + compress_jobs(spec) + inspect_jobs(spec)
