"""Answers: how far two predictors are apart where one must be the other, such as written weights and their learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from pydantic import Field, PositiveInt

from contextlab import registry
from contextlab.claims.costs import Models
from contextlab.claims.measures import Measure, apart, measure, spec_of, told
from contextlab.errors import InputError, unknown
from contextlab.evaluation import predict
from contextlab.experiments import ExperimentSpec, Run
from contextlab.experiments.entries import TaskEntry
from contextlab.models import build_model
from contextlab.prompt import Predictor, Task
from contextlab.spec import Spec
from contextlab.tasks import build_task


class LearnerEntry(Spec):
    """A learner of a measure.

    learner: its registered name.
    options: its own.
    """

    learner: str
    options: dict[str, Any] = Field(default_factory=dict)


@measure("answer_agreement")
@dataclass(frozen=True)
class AnswerAgreement(Measure):
    """The greatest difference of each predictor's answers from those of one of them, over the greatest answer.

    It is taken over all places that the task scores, on the same prompts, in float64: weights that are written down are
    written in float64, those that are drawn, from seed 0, are float32's.

    task: whose prompts are answered: {task, preset, options}, as in a recipe.
    models: by name, as in a recipe; none is trained.
    learners: by name: {learner, options}.
    than: the predictor that the others are compared with.
    prompts: of each draw. draws: of prompts.
    """

    kind = "draws"

    task: TaskEntry
    than: str
    models: Models = field(default_factory=dict)
    learners: dict[str, LearnerEntry] = field(default_factory=dict)
    prompts: PositiveInt = 64
    draws: PositiveInt = 10

    def _task(self) -> Task:
        return build_task(self.task.task, preset=self.task.preset, **self.task.options)

    def names(self, spec: ExperimentSpec | None) -> Sequence[str]:
        known = [*self.models, *self.learners]
        if self.than not in known:
            raise InputError(f"than: {unknown('predictor', self.than, known)}")
        self._predictors()
        return [name for name in known if name != self.than]

    def _predictors(self) -> dict[str, Predictor]:
        task, found = self._task(), {}
        for name, each in self.models.items():
            given = spec_of(each, f"models.{name}")
            fits = given.for_task(task)
            written = given.construction
            found[name] = build_model(fits).double() if written is None else written.made().build(torch.float64)
        for name, other in self.learners.items():
            entry = registry.lookup("learner", other.learner)
            found[name] = entry.factory(**entry.check(other.options, path=f"learners.{name}.options"))
        return found

    @torch.no_grad()
    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        task, predictors, found = self._task(), self._predictors(), []
        for draw in range(self.draws):
            prompt = task.sample(self.prompts, torch.Generator().manual_seed(draw)).to(torch.float64)
            said = {name: predict(each, prompt).double()[prompt.scored] for name, each in predictors.items()}
            wanted = said.pop(self.than)
            for name, answers in said.items():
                away = apart(answers, wanted)
                found.append({"model": name, "seed": draw, "metric": "difference", "value": away})
        return told(found)
