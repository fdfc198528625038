"""What a model of a recipe learns from a teacher (`distill:`): found, checked before the first step, recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn

from contextlab.convert.objective import check_objective, taught
from contextlab.convert.teacher import Distil
from contextlab.errors import InputError
from contextlab.experiments.starts import Source, find_source
from contextlab.models import Model
from contextlab.prompt import Task
from contextlab.training.spec import TrainSpec

if TYPE_CHECKING:
    from contextlab.experiments.jobs import Training
    from contextlab.experiments.spec import ExperimentSpec

UNHEEDED = ("examples", "layer_skip")
"""Keys of `train` that are of the task's own prompts and loss, in whose place stand the teacher's."""


class DistillSpec(Distil):
    """What a model learns from a trained one, beside or in the place of its task: weights of the terms of its loss.

    teacher: a trained model, as `from` has it; None is the one that the model starts from.
    attention: the outputs of the teacher's mixers, on the teacher's own inputs of the layers that were replaced. Those
        alone are trained, all at once, and no other weight may stand beside it.
    matrix: the matrices by which the teacher's heads mix tokens, by the same layers and as alone.
    hidden: the teacher's hidden vectors after every block.
    logits: the teacher's predictions where the task scores.
    task: the task's own loss.
    temperature: by which both models' logits are divided.
    """

    teacher: Annotated[str, Field(min_length=1)] | None = None


@dataclass(frozen=True)
class Teaching:
    """What one training learns from. source: the teacher. distil: the terms of the loss."""

    source: Source
    distil: Distil

    def check(self, training: Training) -> None:
        """Raises InputError where the training cannot learn so, found from specs."""
        train = training.train
        for key in UNHEEDED:
            if getattr(train, key):
                raise InputError(f"train.{key}: cannot stand beside distill; leave it out")
        alone = "attention" if self.distil.attention else "matrix"
        if self.distil.by_layer and train.until:
            raise InputError(
                f"train.until: {alone} answers no prompts, so nothing is scored; leave it out, or take logits"
            )
        if self.distil.by_layer and train.freeze:
            raise InputError(f"train.freeze: {alone} trains the replaced mixers alone; leave it out, or take logits")
        if train.adapter is not None and (self.distil.by_layer or self.distil.hidden):
            raise InputError("train.lora, train.ia3: adapters learn from logits and task; give distill these alone")
        check_objective(training.model, self.source.spec, self.distil)

    def words(self) -> str:
        """What is learned, in a line: "attention of runs/base:softmax"."""
        terms = {name: getattr(self.distil, name) for name in ("attention", "matrix", "hidden", "logits", "task")}
        heat = f" at temperature {self.distil.temperature:g}" if self.distil.temperature != 1 else ""
        told = [f"{name}{heat * (name == 'logits')}" for name, weight in terms.items() if weight]
        weights = [f"{weight:g}" for weight in terms.values() if weight]
        weighed = f" (weights {', '.join(weights)})" if len(weights) > 1 else ""
        return f"{', '.join(told)}{weighed} of {self.source.text}"

    def record(self) -> dict[str, Any]:
        """What records tell of it."""
        return {
            "teacher": self.source.text,
            "folder": str(self.source.folder),
            "weights_sha256": self.source.digest,
            "told": self.words(),
            "distil": self.distil.model_dump(),
        }


def teaching_of(spec: ExperimentSpec, name: str, task: str, seed: int, train: TrainSpec) -> Teaching | None:
    """What a training of the model called `name` learns from; None where it has no teacher, or makes no step.

    Raises InputError where the teacher is not there.
    """
    entry = spec.models[name]
    wanted = spec.distill if entry.distill is None else entry.distill
    if wanted is None or train.steps == 0:
        return None
    text = wanted.teacher or entry.source
    if text is None:
        raise InputError(f"models.{name}: distill.teacher: the model starts fresh, so the teacher must be named")
    try:
        source = find_source(text, task, seed)
    except InputError as error:
        raise InputError(f"models.{name} (for task {task}): distill.teacher: {error}") from None
    # without the teacher's place, which may change while the training is the same
    terms = Distil.parse({key: getattr(wanted, key) for key in Distil.model_fields})
    return Teaching(source, terms)


@contextmanager
def learning(model: Model, training: Training, device: torch.device) -> Iterator[tuple[nn.Module, list[Task]]]:
    """What `train` is given for a training: the model and its tasks, or what its teacher makes of them."""
    tasks = list(training.tasks.values())
    if training.teaching is None:
        yield model, tasks
        return
    teacher = training.teaching.source.load().to(device)
    with taught(model, teacher, tasks, training.teaching.distil) as found:
        yield found


def described(training: Training) -> Mapping[str, Any]:
    """What a training's record tells of its teacher; {} of none."""
    return {} if training.teaching is None else {"distill": training.teaching.record()}
