"""TaskSpec: a task by name, as data."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from contextlab import registry
from contextlab.prompt import Task
from contextlab.spec import Spec


class TaskSpec(Spec):
    """A task by its registered name.

    name: registered name.
    options: the task's options.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _possible(self) -> TaskSpec:
        registry.lookup("task", self.name).check(self.options, path="options")
        self.build()
        return self

    def build(self) -> Task:
        """The task. Raises InputError on options that are impossible together."""
        task: Task = registry.lookup("task", self.name).build(**self.options)
        return task
