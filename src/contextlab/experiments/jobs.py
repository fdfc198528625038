"""Job: one piece of a run's work, as a value; what a training is; and the list of an experiment's jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from contextlab.evaluation.spec import EvaluateSpec
from contextlab.models import ModelSpec
from contextlab.prompt import Task
from contextlab.training.spec import TrainSpec

if TYPE_CHECKING:
    from contextlab.experiments.spec import ExperimentSpec


@dataclass(frozen=True)
class Job:
    """One piece of a run's work: to train a model and measure it, to measure learners, or to measure policies.

    kind: which of them.
    task: a task of the experiment, or an entry of `multitask`; "" of policies.
    model: its name in the results; "" of learners.
    seed: of the training; 0 of learners.
    """

    kind: Literal["training", "learners", "compress"]
    task: str = ""
    model: str = ""
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name in messages and files, its own in the experiment. It is only written, never read."""
        if self.kind == "learners":
            return f"learners.{self.task}"
        if self.kind == "compress":
            return f"{self.model}.seed{self.seed}.compress"
        return f"{self.task}.{self.model}.seed{self.seed}"

    @property
    def title(self) -> str:
        """Its name for people: the seed where it is not 0."""
        if self.kind == "learners":
            return f"learners of {self.task}"
        parts = [self.task or "policies", self.model] + ([f"seed {self.seed}"] if self.seed else [])
        return " / ".join(parts)

    @property
    def fields(self) -> dict[str, Any]:
        """What records say of it."""
        return {"key": self.key, "kind": self.kind, "task": self.task, "model": self.model, "seed": self.seed}


@dataclass(frozen=True)
class Training:
    """One model to be trained on one task, or on several, from one seed, everything resolved.

    task_name: of the task, or of the entry of `multitask`.
    model_name: in the results; of a training on several tasks "MODEL+TASK_NAME".
    tasks: name -> task that it is trained and measured on.
    evaluate: name of a task -> what is measured on it.
    """

    task_name: str
    model_name: str
    seed: int
    tasks: Mapping[str, Task]
    model: ModelSpec
    train: TrainSpec
    evaluate: Mapping[str, EvaluateSpec]

    @property
    def job(self) -> Job:
        """What a run does with it."""
        return Job("training", self.task_name, self.model_name, self.seed)

    @property
    def key(self) -> str:
        """Its folder's name in the run."""
        return self.job.key


def first_jobs(spec: ExperimentSpec) -> list[Job]:
    """Trainings and learners of an experiment, in order."""
    return [training.job for training in spec.trainings()] + [Job("learners", task=name) for name in spec.tasks]


def compress_jobs(spec: ExperimentSpec) -> list[Job]:
    """What needs trained models: measurements under policies, one a seed."""
    if spec.compress is None:
        return []
    return [Job("compress", model=spec.compress.model, seed=seed) for seed in spec.seeds]


def all_jobs(spec: ExperimentSpec) -> list[Job]:
    """All jobs of an experiment, in order."""
    return first_jobs(spec) + compress_jobs(spec)
