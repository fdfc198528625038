"""A training that ends as soon as the model is good enough, by validation prompts that it looks at now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch

from contextlab.errors import InputError, unknown
from contextlab.models.answer import answer
from contextlab.prompt import HIGHER_IS_BETTER, Prompt, Task
from contextlab.training.distributed import seeded
from contextlab.training.spec import TrainSpec, UntilSpec
from contextlab.training.validation import ValidationSpec, validate

STREAM = "until"
"""Not that of a sweep's validation: what stopped a training does not flatter it when trials are compared."""


class Look(TypedDict):
    """A look at the validation prompts. step: after which. values: of the metric, of each task in order."""

    step: int
    values: list[float]


class Until:
    """When a training on these tasks may end.

    model: a `Model` on `device`. tasks: as they are at the end of a curriculum; all must be good enough.
    spec: whose `until` is read. apart: of each task, leaves out prompts that are trained on; None leaves out none.

    Raises InputError for a metric that a task does not have, or that is better the other way.
    """

    def __init__(
        self,
        model: Any,
        tasks: Sequence[Task],
        spec: TrainSpec,
        device: torch.device,
        apart: Sequence[Callable[[Prompt], Prompt]] | None = None,
    ) -> None:
        assert spec.until is not None
        self.model, self.tasks, self.until, self.steps, self.device = model, tasks, spec.until, spec.steps, device
        self.apart = apart
        self.validation = ValidationSpec(
            prompts=spec.until.prompts, batch=min(256, spec.until.prompts), seed=spec.until.seed
        )
        for task in tasks:
            check_direction(task, spec.until)
            prompt = task.sample(1, seeded("until's metric", 0, device=device), device)
            with torch.no_grad():
                check_metric(task, spec.until, task.errors(answer(model, prompt), prompt))

    def due(self, step: int) -> bool:
        """Whether to look after this step, counted from 1."""
        return step % self.until.every == 0 or step == self.steps

    def look(self, step: int) -> Look:
        """Measure the model, which is left as it was."""
        values = [
            validate(
                self.model,
                task,
                self.validation,
                metric=self.until.metric,
                device=self.device,
                apart=self.apart[i] if self.apart else None,
                stream=STREAM,
            ).value
            for i, task in enumerate(self.tasks)
        ]
        return {"step": step, "values": values}

    def reached(self, look: Look) -> bool:
        """Whether every task's value is good enough."""
        least, most = self.until.at_least, self.until.at_most
        return all(value >= least if least is not None else value <= (most or 0.0) for value in look["values"])

    def words(self, look: Look) -> str:
        """Why the training ended, in one line."""
        least, most = self.until.at_least, self.until.at_most
        goal = f"at most {most:g}" if least is None else f"at least {least:g}"
        values = " and ".join(f"{value:.4g}" for value in look["values"])
        return (
            f"stopped after step {look['step']} of {self.steps}: {self.until.metric or self.tasks[0].metric} was "
            f"{values} on {self.until.prompts} validation prompts ({goal} was asked for)"
        )


def check_direction(task: Task, until: UntilSpec) -> None:
    """Raises InputError where the goal is on the wrong side of what is better."""
    metric = until.metric or task.metric
    higher = task.higher_is_better if metric == task.metric else metric in HIGHER_IS_BETTER
    if higher != (until.at_least is not None):
        better, wanted = ("larger", "at_least") if higher else ("smaller", "at_most")
        raise InputError(f"until: {metric} is better when {better}; give {wanted}")


def check_metric(task: Task, until: UntilSpec, errors: dict[str, Any]) -> None:
    """Raises InputError where the task has no such metric. errors: those of any of its prompts."""
    metric = until.metric or task.metric
    if metric not in errors:
        raise InputError(f"until.metric: {unknown('metric of this task', metric, errors)}")
