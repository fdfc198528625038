"""ExperimentSpec: tasks, models, training, evaluation and seeds, as data. A recipe is the YAML of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PrivateAttr, model_validator

from contextlab import registry
from contextlab.errors import ContextlabError, InputError, unknown
from contextlab.evaluation.compress import check_settings
from contextlab.evaluation.spec import CompressSpec, EvaluateSpec
from contextlab.experiments.jobs import Job, Training
from contextlab.models import ModelSpec, preset
from contextlab.prompt import Task
from contextlab.spec import Spec
from contextlab.tasks import build_task, preset_options
from contextlab.training.schedule import Turns
from contextlab.training.spec import TrainSpec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$", max_length=60)]


class TaskEntry(Spec):
    """A task of an experiment.

    task: registered name.
    preset: one of the task's named difficulties.
    options: the task's options, which may change the preset's.
    model: changes for this task to every model that has such an option, for example `{depth: 2}`.
    train: changes to the experiment's `train` for this task.
    evaluate: changes to the experiment's `evaluate` for this task.
    """

    task: str
    preset: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)


class MultiTaskEntry(Spec):
    """A training of one model on several of the experiment's tasks, which take turns (2404.03558).

    The tasks' own changes to models and training do not count here, those of `evaluate` do.

    tasks: their names, in the order of the curriculum.
    model: changes to every model that has such an option.
    train: changes to the experiment's `train`; `order` says how the tasks take turns.
    """

    tasks: tuple[Name, ...]
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _several(self) -> MultiTaskEntry:
        if len(set(self.tasks)) < max(2, len(self.tasks)):
            raise InputError(f"tasks: expected two or more different tasks, got {list(self.tasks)}")
        return self


class ModelEntry(Spec):
    """A model of an experiment: a preset with options, or a whole ModelSpec.

    preset: registered name of a preset.
    options: the preset's options, or keys of ModelSpec that replace what the preset chose.
    spec: a ModelSpec, in place of a preset.
    train: changes to the task's training for this model.
    """

    preset: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    spec: dict[str, Any] | None = None
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if (self.preset is None) == (self.spec is None):
            raise InputError("give either preset (a registered model's name) or spec (a ModelSpec), not both")
        return self

    def knows(self, option: str) -> bool:
        """Whether `option` is a key of ModelSpec or an option of the preset."""
        if option in ModelSpec.model_fields or self.preset not in registry.names("model"):
            return option in ModelSpec.model_fields
        return any(p.name == option for p in registry.lookup("model", self.preset).parameters)


class ExperimentSpec(Spec):
    """A whole experiment: every model is trained on every task, and on every group of `multitask`, from every seed.

    name: of the run.
    description: one or two sentences for the report.
    tasks: name in the results -> task.
    models: name in the results -> model.
    multitask: name -> tasks that one more training of every model goes through; it is evaluated on each of them, as
        the model "MODEL+NAME".
    alone: whether models are also trained on each task by itself; false leaves only the trainings of `multitask`.
    train: how models are trained.
    evaluate: what is measured.
    compress: what one of the models loses under policies that keep a part of its context.
    seeds: of parameters and training prompts.
    """

    name: Name
    description: str = ""
    tasks: dict[Name, TaskEntry]
    models: dict[Name, ModelEntry]
    multitask: dict[Name, MultiTaskEntry] = Field(default_factory=dict)
    alone: bool = True
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    compress: CompressSpec | None = None
    seeds: tuple[NonNegativeInt, ...] = (0,)
    _tasks: dict[str, Task] = PrivateAttr(default_factory=dict)
    _evaluations: dict[str, EvaluateSpec] = PrivateAttr(default_factory=dict)
    _trainings: dict[Job, Training] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _possible(self) -> ExperimentSpec:
        if not self.tasks:
            raise InputError("tasks: expected at least one task")
        if not self.models:
            raise InputError("models: expected at least one model")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds: expected one or more different seeds, got {list(self.seeds)}")
        if not self.alone and not self.multitask:
            raise InputError("alone: false leaves nothing to train; add multitask, or leave it out")
        for name, entry in self.multitask.items():
            if name in self.tasks:
                raise InputError(f"multitask.{name}: a task has this name, too; choose another")
            for task in entry.tasks:
                if task not in self.tasks:
                    raise InputError(f"multitask.{name}.tasks: {unknown('task of this experiment', task, self.tasks)}")
            if taken := [model for model in self.models if f"{model}+{name}" in self.models]:
                raise InputError(
                    f"multitask.{name}: a model is called '{taken[0]}+{name}', as {taken[0]!r} trained on these tasks "
                    "would be; rename one"
                )
        trained = [training.model_name for training in self.trainings()]
        if self.compress is not None:
            for key, model in [("model", self.compress.model), *(("compare", each) for each in self.compress.compare)]:
                if model not in trained:
                    raise InputError(f"compress.{key}: {unknown('trained model', model, dict.fromkeys(trained))}")
                if trained.count(model) > len(self.seeds):
                    raise InputError(
                        f"compress.{key}: {model!r} is trained on each task by itself; expected one that is trained "
                        "once a seed, on the tasks of an entry of multitask"
                    )
            try:
                check_settings(self.compress.policies, self.compress.budgets)
            except InputError as error:
                raise InputError(f"compress: {error}") from None
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> ExperimentSpec:
        """A copy, in which nothing is resolved yet."""
        copied = super().model_copy(update=update, deep=deep)
        copied._tasks, copied._evaluations, copied._trainings = {}, {}, {}
        return copied

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExperimentSpec) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    def build_task(self, name: str) -> Task:
        """The task called `name` in this experiment, built once. Raises InputError with the key's path."""
        if name not in self._tasks:
            self._tasks[name] = self._new_task(name)
        return self._tasks[name]

    def _new_task(self, name: str) -> Task:
        entry = self.tasks[name]
        path = f"tasks.{name}"
        try:
            known = registry.lookup("task", entry.task)
        except InputError as error:
            raise InputError(f"{path}.task: {error}") from None
        known.check(entry.options, path=f"{path}.options")
        try:
            chosen = preset_options(known, entry.preset)
        except InputError as error:
            raise InputError(f"{path}.preset: {error}") from None
        try:
            return build_task(entry.task, **{**chosen, **entry.options})
        except ContextlabError as error:
            raise InputError(f"{path}.options: {error}") from None

    def model_spec(self, name: str, task_name: str, task: Task) -> ModelSpec:
        """The model called `name`, with the task's changes and sizes. Raises InputError with the key's path.

        task_name: of a task or of an entry of `multitask`.
        task: whose sizes the model gets.
        """
        entry = self.models[name]
        changes = {
            key: value
            for key, value in self._entry(task_name).model.items()
            if entry.knows(key) or not any(other.knows(key) for other in self.models.values())
        }
        try:
            if entry.preset is not None:
                spec = preset(entry.preset, **{**entry.options, **changes})
            else:
                spec = ModelSpec.parse({**(entry.spec or {}), **entry.options, **changes})
            return spec.for_task(task)
        except ContextlabError as error:
            raise InputError(f"models.{name} (for task {task_name}): {error}") from None

    def evaluate_spec(self, task_name: str) -> EvaluateSpec:
        """What is measured on this task, resolved once."""
        if task_name not in self._evaluations:
            merged = _merge(self.evaluate, self.tasks[task_name].evaluate)
            self._evaluations[task_name] = EvaluateSpec.parse(merged, f"tasks.{task_name}.evaluate")
        return self._evaluations[task_name]

    def train_spec(self, name: str, task_name: str) -> TrainSpec:
        """How the model is trained on the task: `train`, changed by the task's, then by the model's.

        task_name: of a task or of an entry of `multitask`.
        """
        merged = _merge(self.train, self._entry(task_name).train)
        for path, data in (
            (f"{'tasks' if task_name in self.tasks else 'multitask'}.{task_name}.train", merged),
            (f"models.{name}.train", {**merged, **self.models[name].train}),
        ):
            spec = TrainSpec.parse(data, path)
        return spec

    def trainings(self) -> list[Training]:
        """Every training of the experiment, in order, resolved once."""
        if not self._trainings:
            self._trainings.update((training.job, training) for training in self._resolve())
        return list(self._trainings.values())

    def training(self, job: Job) -> Training:
        """The training that a job of kind "training" is."""
        self.trainings()
        return self._trainings[job]

    def _resolve(self) -> Iterator[Training]:
        built = {name: self.build_task(name) for name in self.tasks}
        groups = {name: (name,) for name in self.tasks if self.alone} | {
            name: entry.tasks for name, entry in self.multitask.items()
        }
        for group, members in groups.items():
            tasks = {name: built[name] for name in members}
            evaluate = {name: self.evaluate_spec(name) for name in members}
            self._check_sizes(group, tasks)
            for name in self.models:
                model = self.model_spec(name, group, tasks[members[0]])
                train = self.train_spec(name, group)
                try:
                    Turns(list(tasks.values()), train)  # an impossible curriculum is refused before anything is trained
                except InputError as error:
                    raise InputError(f"{'tasks' if group in self.tasks else 'multitask'}.{group}: {error}") from None
                called = name if group in self.tasks else f"{name}+{group}"
                for seed in self.seeds:
                    yield Training(group, called, seed, tasks, model, train, evaluate)

    def _entry(self, name: str) -> TaskEntry | MultiTaskEntry:
        return self.tasks[name] if name in self.tasks else self.multitask[name]

    def _check_sizes(self, group: str, tasks: Mapping[str, Task]) -> None:
        """One model must be able to read the prompts of all tasks."""
        first, *others = tasks
        for name in others:
            for size in ("read_in", "input_size", "output_size"):
                has, needs = getattr(tasks[name], size), getattr(tasks[first], size)
                if has != needs:
                    raise InputError(
                        f"multitask.{group}.tasks: {size} of {name!r} is {has!r}, of {first!r} {needs!r}; one model "
                        "needs the same for all"
                    )


def _merge(base: Spec, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {**base.model_dump(exclude_unset=True), **changes}
