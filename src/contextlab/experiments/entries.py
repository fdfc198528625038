"""What the tasks and models of an experiment are, as data."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import ModelSpec
from contextlab.spec import Spec

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
    sweep: changes to the experiment's `sweep` for this model; fields of `over` are added, and null takes one away.
    """

    preset: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    spec: dict[str, Any] | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, Any] = Field(default_factory=dict)

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

    @property
    def option_names(self) -> list[str]:
        """All options that it knows."""
        own = self.preset in registry.names("model") and registry.lookup("model", str(self.preset)).parameters
        return [*(p.name for p in own or ()), *ModelSpec.model_fields]
