"""A training that ends when the model is good enough, or hopeless, by validation prompts looked at now and then."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch

from contextlab.errors import InputError, unknown
from contextlab.models.answer import answer
from contextlab.prompt import HIGHER_IS_BETTER, Prompt, Task
from contextlab.training.distributed import seeded
from contextlab.training.spec import ROUNDING, TrainSpec, UntilSpec
from contextlab.training.validation import ValidationSpec, validate

STREAM = "until"
"""Not that of a sweep's validation: what stopped a training does not flatter it when trials are compared."""


class Look(TypedDict):
    """A look at the validation prompts.

    step: after which. values: of the metric, of each task in order. ci_low, ci_high: their 95% intervals over prompts.
    """

    step: int
    values: list[float]
    ci_low: list[float]
    ci_high: list[float]


class Until:
    """When a training on these tasks may end.

    model: a `Model` on `device`. tasks: as they are at the end of a curriculum; all must be good enough.
    spec: whose `until` is read. apart: of each task, leaves out prompts that are trained on; None leaves out none.

    Raises InputError for a metric that a task does not have, or that is better the other way, and where a task does not
    know what chance gives and `hopeless` asks for it.
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
            check_goal(task, spec.until)
            prompt = task.sample(1, seeded("until's metric", 0, device=device), device)
            with torch.no_grad():
                check_metric(task, spec.until, task.errors(answer(model, prompt), prompt))

    def due(self, step: int) -> bool:
        """Whether to look after this step, counted from 1."""
        return step % self.until.every == 0 or step == self.steps

    def look(self, step: int) -> Look:
        """Measure the model, which is left as it was."""
        scores = [
            validate(
                self.model,
                task,
                self.validation,
                metric=self.until.metric,
                device=self.device,
                apart=self.apart[i] if self.apart else None,
                stream=STREAM,
            )
            for i, task in enumerate(self.tasks)
        ]
        return {
            "step": step,
            "values": [score.value for score in scores],
            "ci_low": [score.ci_low for score in scores],
            "ci_high": [score.ci_high for score in scores],
        }

    def reached(self, look: Look) -> bool:
        """Whether every task's value is good enough."""
        least, most = self.until.at_least, self.until.at_most
        if least is None and most is None:
            return False
        return all(value >= least if least is not None else value <= (most or 0.0) for value in look["values"])

    def hopeless(self, look: Look, before: Look | None) -> bool:
        """Whether no task is seen to be better than chance, and none has improved since the look before, late enough.

        A value that is no number is neither; of one prompt nothing is seen. before: None where this is the first look,
        which nothing can be compared with.
        """
        share = self.until.hopeless
        if share is None or before is None or look["step"] < share * self.steps - ROUNDING:
            return False
        return all(
            self._at_chance(look, i) and not _better(look["values"][i], before["values"][i], self._rises(task))
            for i, task in enumerate(self.tasks)
        )

    def _at_chance(self, look: Look, i: int) -> bool:
        """Whether the interval of a task's value is known, and not on the better side of chance."""
        ends = look["ci_low"][i], look["ci_high"][i]
        if math.isnan(ends[0]) and not math.isnan(look["values"][i]):
            return False
        return no_better_than_chance(*ends, self._chance(self.tasks[i]), self._rises(self.tasks[i]))

    def words(self, look: Look) -> str:
        """Why a training that is good enough ended, in one line."""
        least, most = self.until.at_least, self.until.at_most
        goal = f"at most {most:g}" if least is None else f"at least {least:g}"
        return (
            f"stopped after step {look['step']} of {self.steps}: {self._metric(self.tasks[0])} was "
            f"{_listed(look['values'])} on {self.until.prompts} validation prompts ({goal} was asked for)"
        )

    def hopeless_words(self, look: Look, before: Look) -> str:
        """Why a hopeless training ended, in one line."""
        return (
            f"stopped: hopeless at step {look['step']} of {self.steps}: {self._metric(self.tasks[0])} was "
            f"{_listed(look['values'])} on {self.until.prompts} validation prompts, where chance gives "
            f"{_listed([self._chance(task) for task in self.tasks])}, and {_listed(before['values'])} at step "
            f"{before['step']}"
        )

    def _metric(self, task: Task) -> str:
        return self.until.metric or task.metric

    def _chance(self, task: Task) -> float:
        return task.chance()[self._metric(task)]

    def _rises(self, task: Task) -> bool:
        return rises(task, self._metric(task))


def rises(task: Task, metric: str) -> bool:
    """Whether a metric of the task is better when larger."""
    return task.higher_is_better if metric == task.metric else metric in HIGHER_IS_BETTER


def no_better_than_chance(ci_low: float, ci_high: float, chance: float, higher_is_better: bool) -> bool:
    """Whether a 95% interval is not on the better side of chance; so is one that is no number."""
    return not (ci_low > chance if higher_is_better else ci_high < chance)


def _better(value: float, other: float, higher_is_better: bool) -> bool:
    return value > other if higher_is_better else value < other


def _listed(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.4g}" for value in values)


def check_goal(task: Task, until: UntilSpec) -> None:
    """Raises InputError where the goal is on the wrong side of what is better, or where chance is asked for in vain."""
    metric = until.metric or task.metric
    higher = rises(task, metric)
    if (until.at_most if higher else until.at_least) is not None:
        better, wanted = ("larger", "at_least") if higher else ("smaller", "at_most")
        raise InputError(f"until: {metric} is better when {better}; give {wanted}")
    if until.hopeless is not None and metric not in task.chance():
        known = ", ".join(task.chance())
        raise InputError(
            f"until.hopeless: this task does not know what chance gives in {metric}; "
            + (f"set until.metric to one that it knows it of ({known})" if known else "leave hopeless out")
        )


def check_metric(task: Task, until: UntilSpec, errors: dict[str, Any]) -> None:
    """Raises InputError where the task has no such metric. errors: those of any of its prompts."""
    metric = until.metric or task.metric
    if metric not in errors:
        raise InputError(f"until.metric: {unknown('metric of this task', metric, errors)}")
