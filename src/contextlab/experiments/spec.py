"""ExperimentSpec: tasks, models, training, evaluation and seeds, as data. A recipe is the YAML of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, NonNegativeInt, PrivateAttr, model_validator

from contextlab import registry
from contextlab.errors import ContextlabError, InputError, unknown
from contextlab.evaluation.compress import check_settings
from contextlab.evaluation.spec import CompressSpec, EvaluateSpec
from contextlab.experiments.distill import DistillSpec, teaching_of
from contextlab.experiments.entries import ModelEntry, MultiTaskEntry, Name, TaskEntry
from contextlab.experiments.halving import HalvingSpec
from contextlab.experiments.jobs import Job, Training
from contextlab.experiments.paths import Setting, check_path, setting_words, with_setting
from contextlab.experiments.starts import changed_spec, require_task, source_of, start_of
from contextlab.experiments.sweep import SweepSpec, own_sweep
from contextlab.inspect.spec import InspectSpec
from contextlab.models import ModelSpec, preset
from contextlab.prompt import Task
from contextlab.spec import Spec
from contextlab.tasks import build_task, preset_options
from contextlab.training.schedule import Turns
from contextlab.training.spec import TrainSpec


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
    distill: a teacher that they learn from, beside or in the place of their tasks; None: the tasks alone.
    evaluate: what is measured.
    compress: what one of the models loses under policies that keep a part of its context.
    inspect: which probes are put to the trained models.
    seeds: of parameters and training prompts.
    sweep: at which values each model is trained; the best of them, by validation prompts, is what is measured.
    early: whether early decisions are heeded; false trains all to their last step, whatever `sweep.halving` and
        `train.until` say, those of models and tasks among them.
    """

    name: Name
    description: str = ""
    tasks: dict[Name, TaskEntry]
    models: dict[Name, ModelEntry]
    multitask: dict[Name, MultiTaskEntry] = Field(default_factory=dict)
    alone: bool = True
    train: TrainSpec = Field(default_factory=TrainSpec)
    distill: DistillSpec | None = None
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    compress: CompressSpec | None = None
    inspect: InspectSpec | None = None
    seeds: tuple[NonNegativeInt, ...] = (0,)
    sweep: SweepSpec | None = None
    early: bool = True
    _tasks: dict[str, Task] = PrivateAttr(default_factory=dict)
    _evaluations: dict[str, EvaluateSpec] = PrivateAttr(default_factory=dict)
    _trainings: dict[Job, Training] = PrivateAttr(default_factory=dict)
    _measured: dict[Job, list[Training]] = PrivateAttr(default_factory=dict)
    _sweeps: dict[str, SweepSpec] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _possible(self) -> ExperimentSpec:
        if not self.tasks:
            raise InputError("tasks: expected at least one task")
        if not self.models:
            raise InputError("models: expected at least one model")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds: expected one or more different seeds, got {list(self.seeds)}")
        fresh = [name for name, each in self.models.items() if not each.has_weights and "steps" not in each.train]
        if self.train.steps == 0 and fresh:
            raise InputError(
                f"train.steps: expected at least 1, got 0: {fresh[0]} starts fresh (0 is for from: models)"
            )
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
        called = [f"{model}+{name}" for model in self.models for name in self.multitask]
        if len(set(called)) < len(called):
            twice = next(each for each in called if called.count(each) > 1)
            raise InputError(f"multitask: two trainings would be called {twice!r}; rename a model or an entry")
        self._check_sweeps()
        trained = [job.model for job in self.measured()]
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
        if self.inspect is not None:
            for key, named, known in (
                ("models", self.inspect.models, dict.fromkeys(trained)),
                ("tasks", self.inspect.tasks, self.tasks),
            ):
                for each in named:
                    if each not in known:
                        what = "trained model" if key == "models" else "task of this experiment"
                        raise InputError(f"inspect.{key}: {unknown(what, each, known)}")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> ExperimentSpec:
        """A copy, in which nothing is resolved yet."""
        copied = super().model_copy(update=update, deep=deep)
        copied._tasks, copied._evaluations, copied._trainings = {}, {}, {}
        copied._measured, copied._sweeps = {}, {}
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

    def sweep_spec(self, name: str) -> SweepSpec:
        """The sweep of the model called `name`, resolved once; it has no field where the model is not swept."""
        if name not in self._sweeps:
            entry = self.models[name]
            self._sweeps[name] = own_sweep(self.sweep, entry.sweep, name, entry.knows)
        return self._sweeps[name]

    def _tied(self, name: str, setting: Setting | None) -> Setting:
        """A setting of the model called `name` with the fields that are tied to it."""
        return {**(setting or {}), **self.sweep_spec(name).ties(setting or {})}

    def sweep_of(self, model_name: str) -> SweepSpec:
        """The sweep of a model by its name in the results: of a training on several tasks "MODEL+NAME"."""
        if model_name in self.models:
            return self.sweep_spec(model_name)
        return self.sweep_spec(next(m for m in self.models for name in self.multitask if f"{m}+{name}" == model_name))

    def halving_of(self, model_name: str) -> HalvingSpec | None:
        """The halving that is in force for a model, by its name in the results; None: every trial goes to its end."""
        sweep = self.sweep_of(model_name)
        return sweep.halving if sweep.over and self.early else None

    def deciding_seeds(self, model_name: str) -> tuple[int, ...]:
        """The seeds that all trials of a model are trained from; the others are trained at the chosen setting alone."""
        halving = self.halving_of(model_name)
        return self.seeds if halving is None else self.seeds[: halving.seeds]

    def _check_sweeps(self) -> None:
        """Every path must be one of some model."""
        options = list(dict.fromkeys(option for entry in self.models.values() for option in entry.option_names))
        for path in self.sweep.over if self.sweep else ():
            check_path(path, "sweep.over", options, self.models)
        for path, tie in (self.sweep.tied if self.sweep else {}).items():
            check_path(path, "sweep.tied", options)
            if tie.to.startswith("models."):
                _, name, rest = tie.to.split(".", 2)
                raise InputError(
                    f"sweep.tied.{path}.to: {tie.to} is swept for one model alone; tie it in models.{name}.sweep.tied, "
                    f"to: {rest}"
                )
        if self.sweep and self.sweep.halving and not any(self.sweep_spec(name).over for name in self.models):
            raise InputError("sweep.halving: no field is swept, so there is nothing to drop; give sweep.over")
        for name, entry in self.models.items():
            for key, paths in (("over", self.sweep_spec(name).over), ("tied", self.sweep_spec(name).tied)):
                for path in paths:
                    check_path(path, f"models.{name}.sweep.{key}", entry.option_names)
                    if not self.early and f"{path}.".startswith("train.until."):
                        raise InputError(f"early: false leaves {path} unheeded, which is swept; take one of them away")

    def model_spec(self, name: str, task_name: str, task: Task, setting: Setting | None = None) -> ModelSpec:
        """The model called `name`, with the task's changes and sizes. Raises InputError with the key's path.

        task_name: of a task or of an entry of `multitask`.
        task: whose sizes the model gets.
        setting: of a trial; it goes before what the entries say, and so does what is tied to it.
        """
        entry = self.models[name]
        setting = self._tied(name, setting)
        changes = {
            key: value
            for key, value in self._entry(task_name).model.items()
            if entry.knows(key) or not any(other.knows(key) for other in self.models.values())
        }
        try:
            data = with_setting({**(entry.spec or {}), **entry.options, **changes}, setting, "options")
            source = source_of(self, name, task_name)
            if source is not None:
                spec = changed_spec(entry, source, data)
            else:
                spec = preset(entry.preset, **data) if entry.preset is not None else ModelSpec.parse(data)
            if any(path.startswith("spec.") for path in setting):
                spec = ModelSpec.parse(with_setting(spec.model_dump(), setting, "spec"))
            if source is not None:
                require_task(spec, source, task)
            return spec.for_task(task)
        except ContextlabError as error:
            raise InputError(f"models.{name} (for task {task_name}): {error}") from None

    def evaluate_spec(self, task_name: str) -> EvaluateSpec:
        """What is measured on this task, resolved once."""
        if task_name not in self._evaluations:
            merged = _merge(self.evaluate, self.tasks[task_name].evaluate)
            self._evaluations[task_name] = EvaluateSpec.parse(merged, f"tasks.{task_name}.evaluate")
        return self._evaluations[task_name]

    def train_spec(self, name: str, task_name: str, setting: Setting | None = None) -> TrainSpec:
        """How the model is trained on the task: `train`, changed by the task's, the model's, and the trial's setting.

        task_name: of a task or of an entry of `multitask`.
        """
        merged = _merge(self.train, self._entry(task_name).train)
        own = {**merged, **self.models[name].train}
        for path, data in (
            (f"{'tasks' if task_name in self.tasks else 'multitask'}.{task_name}.train", merged),
            (f"models.{name}.train", own),
            (f"models.{name}.train", with_setting(own, self._tied(name, setting), "train")),
        ):
            spec = TrainSpec.parse(data, path)
        return spec if self.early else spec.model_copy(update={"until": None})

    def trainings(self) -> list[Training]:
        """Every training of the experiment, each trial of a sweep among them, in order, resolved once.

        What seeds that do not decide (`deciding_seeds`) are trained at is chosen later, among `candidates`.
        """
        self._resolve_once()
        return list(self._trainings.values())

    def _resolve_once(self) -> None:
        if not self._trainings:
            for training in self._resolve():
                if training.trial is None or training.seed in self.deciding_seeds(training.model_name):
                    self._trainings[training.job] = training
                self._measured.setdefault(training.measured, []).append(training)

    def training(self, job: Job) -> Training:
        """The training that a job of kind "trial" is, or one of kind "training" whose model is not swept."""
        self._resolve_once()
        return self._trainings[replace(job, rung=None)]

    def settle(self, job: Job, number: int, setting: Setting) -> None:
        """Give a trial its setting, which a sampler chose. job: of kind "training", that measures its best trial."""
        name, first = job.model.removesuffix(f"+{job.task}"), next(iter(self.candidates(job)[number].tasks.values()))
        try:
            model = self.model_spec(name, job.task, first, setting)
            train = self.train_spec(name, job.task, setting)
        except InputError as error:
            raise InputError(f"sweep.over: {setting_words(setting)}: {error}") from None
        for seed in self.seeds:
            known = self.candidates(Job("training", job.task, job.model, seed))
            before = known[number]
            start = start_of(self, name, job.task, seed, model)
            known[number] = replace(before, model=model, train=train, setting=setting, start=start)
            self._trainings[before.job] = known[number]

    def measured(self) -> list[Job]:
        """A job of kind "training" for each model, task and seed: what results and report tell of."""
        self._resolve_once()
        return list(self._measured)

    def candidates(self, job: Job) -> list[Training]:
        """The trainings of which a job of kind "training" measures one: the trials of a sweep, or the only one."""
        self._resolve_once()
        return self._measured[job]

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
                yield from self._resolve_model(name, group, tasks, evaluate)

    def _resolve_model(
        self, name: str, group: str, tasks: Mapping[str, Task], evaluate: Mapping[str, EvaluateSpec]
    ) -> Iterator[Training]:
        """The trainings of one model on one task or group: of each setting of its sweep, from each seed."""
        first = next(iter(tasks.values()))
        called = name if group in self.tasks else f"{name}+{group}"
        sweep = self.sweep_spec(name)
        try:
            settings = sweep.settings()
        except InputError as error:
            raise InputError(f"sweep (of model {name}): {error}") from None
        if sweep.over and len({(task.metric, task.higher_is_better) for task in tasks.values()}) > 1:
            raise InputError(
                f"sweep: the tasks of multitask.{group} are judged by different metrics, so that no trial is the best "
                f"({', '.join(f'{each}: {task.metric}' for each, task in tasks.items())}); "
                "sweep models on tasks of one metric, or set alone"
            )
        models: dict[str, ModelSpec] = {}  # by the options that are swept: most trials share one
        for number, setting in enumerate(settings):
            whole = {**setting, **sweep.ties(setting)}
            try:
                options = repr({path: value for path, value in whole.items() if not path.startswith("train.")})
                if options not in models:
                    models[options] = self.model_spec(name, group, first, setting)
                train = self.train_spec(name, group, setting)
            except InputError as error:
                raise InputError(f"sweep.over: {setting_words(whole)}: {error}" if setting else str(error)) from None
            try:
                Turns(list(tasks.values()), train)  # an impossible curriculum is refused before anything is trained
            except InputError as error:
                raise InputError(f"{'tasks' if group in self.tasks else 'multitask'}.{group}: {error}") from None
            trial = number if sweep.over else None
            for seed in self.seeds:
                start = start_of(self, name, group, seed, models[options])
                if start is None and models[options].construction is None and train.steps == 0:
                    raise InputError(f"models.{name}: train.steps: 0 is for a model that starts from a trained one")
                yield Training(
                    group, called, seed, tasks, models[options], train, evaluate, trial, setting, start,
                    teaching_of(self, name, group, seed, train),
                )  # fmt: skip

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
