"""Steps: how long a model trains until it is good enough, by the looks that its training took, or by its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch

from contextlab.claims.measures import Measure, measure, told
from contextlab.errors import InputError, unknown
from contextlab.experiments import ExperimentSpec, Run
from contextlab.report.naming import record_tasks


@measure("steps")
@dataclass(frozen=True)
class Steps(Measure):
    """Steps until a value first reaches a bound, of each training of the recipe; the metrics are steps and prompts.

    It is known from one look to the next: the first look that reaches the bound is the value, and the one before it
    the lower end. A training that never reaches it counts as its last look, and has no upper end: what it would have
    taken is that or more.

    task: of the recipe.
    of: "looks", the task's metric on validation prompts, which the recipe takes every `train.until.every` steps; or
        "loss", the training loss, a mean over the steps of each row of the log.
    at_least: the bound of a metric that is better when larger; give this or at_most.
    at_most: the bound of one that is better when smaller.
    """

    kind = "trainings"
    of_run = True

    task: str
    of: Literal["looks", "loss"] = "looks"
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise InputError("expected at_least or at_most, one of them")

    def names(self, spec: ExperimentSpec | None) -> Sequence[str]:
        if spec is None or self.task not in spec.tasks:
            raise InputError(f"task: {unknown('task of the recipe', self.task, spec.tasks if spec else ())}")
        trainings = [each for each in spec.trainings() if self.task in each.tasks and len(each.tasks) == 1]
        for each in trainings if self.of == "looks" else ():
            until = each.train.until
            if until is None:
                raise InputError(
                    f"of: {each.model_name} is not looked at as it trains; give the recipe train.until, or of: loss"
                )
            goal = until.at_least if self.at_least is not None else until.at_most
            bound = self.at_least if self.at_least is not None else self.at_most
            assert bound is not None
            if goal is None or (goal < bound if self.at_least is not None else goal > bound):
                key = "at_least" if self.at_least is not None else "at_most"
                raise InputError(f"{key}: {bound:g} must not be beyond the goal at which train.until ends, {goal}")
        return list(dict.fromkeys(each.model_name for each in trainings))

    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        assert run is not None
        found = []
        for record in run.records:
            if record_tasks(record) != [self.task]:
                continue
            looks = self._looks(record)
            reached = next((i for i, (_, value) in enumerate(looks) if self._good(value)), None)
            last = looks[-1][0] if looks else int(record.get("steps", 0))
            if record["status"] == "diverged":
                reached = None
            value = last if reached is None else looks[reached][0]
            ends = (value, math.inf) if reached is None else (looks[reached - 1][0] if reached else 0, value)
            batch = int(record["train_spec"]["batch"])
            for metric, each in (("steps", 1), ("prompts", batch)):
                found.append(
                    {"model": record["model"], "seed": record["seed"], "metric": metric, "value": float(value * each),
                     "ci_low": float(ends[0] * each), "ci_high": float(ends[1] * each)}
                )  # fmt: skip
        return told(found)

    def _looks(self, record: Mapping[str, Any]) -> list[tuple[int, float]]:
        """(step, value) in order."""
        if self.of == "looks":
            return [(int(look["step"]), _number(look["values"][0])) for look in record.get("looks", ())]
        history = record.get("history") or {}
        return list(zip(map(int, history.get("step", ())), map(_number, history.get("loss", ())), strict=True))

    def _good(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


def _number(value: Any) -> float:
    """Of a record, which has null for what is no number."""
    return math.nan if value is None else float(value)
