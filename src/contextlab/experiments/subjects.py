"""What probes are put to: the trained models of a run with the tasks that they were trained on, or one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from contextlab.errors import InputError, unknown
from contextlab.experiments.folder import OF_RUN, OF_TRAINING, RECORD, RunFolder, read_run_record
from contextlab.experiments.made_with import naming_plugins
from contextlab.experiments.models import find_model
from contextlab.experiments.recipes import load_recipe
from contextlab.inspect.looking import Looked, look
from contextlab.inspect.viewing import Viewed, view
from contextlab.models import Model
from contextlab.policies.core.parse import parse_options
from contextlab.prompt import Task
from contextlab.prompt import task_name as name_of
from contextlab.report.naming import record_tasks
from contextlab.tasks import build_task
from contextlab.training import checkpoint


@dataclass(frozen=True)
class Found:
    """A trained model and a task, to be looked into.

    load: the model. checkpoints: step -> what loads it as it was then.
    """

    run: str
    model: str
    seed: int
    task_name: str
    task: Task
    load: Callable[[], Model]
    checkpoints: Mapping[int, Callable[[], Model]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name for people."""
        return " / ".join([self.task_name, self.model] + ([f"seed {self.seed}"] if self.seed else []))

    def look(
        self,
        probes: list[str] | None,
        seed: int = 0,
        progress: Callable[[str], None] = lambda text: None,
        skip: bool = False,
    ) -> Looked:
        """Put probes to it; see `contextlab.inspect.look`."""
        return look(
            self.load(), self.task, probes, seed=seed, name=self.model, run=self.run, task_name=self.task_name,
            training_seed=self.seed, checkpoints=self.checkpoints, progress=progress, skip=skip,
        )  # fmt: skip

    def view(self, seed: int = 0) -> Viewed:
        """What an interactive map of it shows; see `contextlab.inspect.viewing`."""
        return view(self.load(), self.task, self.title, seed=seed)


def read_task(text: str) -> Task:
    """The task that a text describes: "NAME" or "NAME:option=value,...", where preset=easy takes that difficulty.

    Raises InputError with the nearest name, or on impossible options.
    """
    name, options = parse_options(text, "task")
    return build_task(name, **options)


def find_subjects(source: str, task: str | None = None, device: torch.device | str = "cpu") -> list[Found]:
    """What is meant: of a run each of its trained models on each of its tasks, else one model on the task that is told.

    source: the folder of a run; RUN:MODEL for one of its models; or what `find_model` takes. task: of a run one of its
        tasks, by its name there; of another model as `read_task` reads it.

    Raises InputError where there is none.
    """
    run, _, model = source.rpartition(":")
    for folder, wanted in ((Path(source), None), (Path(run) if run else None, model)):
        if folder is not None and (folder / "trainings").is_dir() and (folder / RECORD).exists():
            return list(_of_run(RunFolder(folder), task, wanted, device))
    if task is None:
        raise InputError("--task: on whose prompts? Give a task, such as associative_recall:preset=easy")
    built = read_task(task)
    name, loaded, _ = find_model(source, device, native=True)
    assert isinstance(loaded, Model)
    return [Found("", name, 0, name_of(built), built, lambda: loaded)]


def _of_run(folder: RunFolder, task: str | None, model: str | None, device: torch.device | str) -> Iterator[Found]:
    name = str(read_run_record(folder.record, OF_RUN)["name"])
    spec = load_recipe(folder.spec)
    if task is not None and task not in spec.tasks:
        raise InputError(f"--task: {unknown('task of this run', task, spec.tasks)}")
    records = [read_run_record(path, OF_TRAINING) for path in sorted(folder.path.glob(f"trainings/*/{RECORD}"))]
    ended = [each for each in records if each["status"] == "finished"]
    known = dict.fromkeys(str(each["model"]) for each in ended)
    if not ended:
        raise InputError(f"{folder}: no training has finished; go on with: contextlab run {folder} --resume")
    if model is not None and model not in known:
        raise InputError(f"{folder}: {unknown('trained model', model, known)}")
    found = False
    for record in ended:
        at = loaders(folder.path, folder.path / "trainings" / str(record["key"]), device)
        names = [each for each in record_tasks(record) if task in (None, each)]
        if not at or model not in (None, record["model"]):
            continue
        for each in names:
            found = True
            with naming_plugins(folder.path):
                built = spec.build_task(each)
            yield Found(name, str(record["model"]), int(record["seed"]), each, built, at[max(at)], at)
    if not found:
        raise InputError(f"{folder}: no finished training with a checkpoint of what was asked for")


def loaders(run: Path, training: Path, device: torch.device | str) -> dict[int, Callable[[], Model]]:
    """Step -> what loads the checkpoint of a training in a run, in rising order."""
    return {step: partial(_load, run, path, device) for step, path in checkpoint.steps(training).items()}


def _load(run: Path, path: Path, device: torch.device | str) -> Model:
    with naming_plugins(run):
        return checkpoint.load(path, device).eval()
