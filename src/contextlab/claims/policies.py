"""What a trained model keeps when policies keep a part of its context: the recipe's `compress`, as a claim's table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from contextlab.claims.cells import Table
from contextlab.claims.measures import Measure, measure
from contextlab.errors import InputError, unknown
from contextlab.evaluation.compress import FULL, OWN
from contextlab.evaluation.compress.prompts import is_text
from contextlab.evaluation.intervals import t95
from contextlab.evaluation.results import COMPRESS_COLUMNS, table
from contextlab.experiments import ExperimentSpec, Run
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.compress import main_metric
from contextlab.report.findings import findings

BYTES = "bytes"


@measure("policies")
@dataclass(frozen=True)
class Policies(Measure):
    """Each training of the recipe's `compress.model` under each policy, beside its full cache ("full").

    Metrics: the task's own (cross-entropy of text); excess_METRIC, how much worse it is than with the full cache, on
    the same prompts; bytes, of the state over those of the full cache.

    task: one of `compress.tasks`, as it is written there.
    budget: one of `compress.budgets`, of policies that take one; those that take none are in the table at any.
    length: one of `compress.lengths`; default the only one.
    """

    kind = "trainings"
    of_run = True

    task: str
    budget: str | None = None
    length: int | None = None

    def names(self, spec: ExperimentSpec | None) -> Sequence[str]:
        asked = spec.compress if spec is not None else None
        if asked is None:
            raise InputError("expected a recipe with compress, which says of what model, policies and tasks")
        for name, chosen, known in (
            ("task", self.task, asked.tasks),
            ("budget", self.budget, asked.budgets),
            ("length", self.length, asked.lengths),
        ):
            if chosen is not None and chosen not in known:
                raise InputError(
                    f"{name}: {unknown(f'{name} of compress', str(chosen), [str(each) for each in known])}"
                )
        if self.length is None and len(asked.lengths) > 1:
            raise InputError(f"length: expected one of compress.lengths, {', '.join(map(str, asked.lengths))}")
        return [FULL, *asked.policies]

    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        assert run is not None
        of_task = run.compressed[(run.compressed["task"] == self.task) & (run.compressed["kind"] == "policy")]
        if self.length is not None:
            of_task = of_task[of_task["length"] == self.length]
        here = of_task[of_task["split"].isin([FULL, OWN, *([self.budget] if self.budget is not None else [])])]
        metric = "cross_entropy" if is_text(self.task) else main_metric(self.task, here)
        seeds = here.groupby("model")["seed"].nunique()
        here = here[here["model"].map(seeds) == seeds[FULL]]  # what some training could not be served by has no mean
        found: list[dict[str, Any]] = []
        for seed in here["seed"].unique().tolist():
            rows = here[here["seed"] == seed]
            by = {str(name): rows[rows["model"] == name].set_index("metric") for name in rows["model"].unique()}
            for name, own in by.items():
                who = {"run": "", "model": name, "kind": "model", "task": self.task, "split": "train"}
                at = {"seed": seed, "prompts": by[FULL]["prompts"].loc[metric]}
                found += ({**who, **at, **row} for row in _of(own, by[FULL], metric))
        return table(found, COMPRESS_COLUMNS)

    def table(self, rows: pd.DataFrame) -> Table:
        (found,) = findings(rows, rows[rows["metric"] != BYTES])
        return Table(rows, self.kind, "prompts", found)


def _of(own: pd.DataFrame, full: pd.DataFrame, metric: str) -> Iterator[dict[str, Any]]:
    """The rows of one policy in one training. own, full: what was measured, by metric."""
    told = ("value", "ci_low", "ci_high", "n", "values")
    yield {"metric": metric, **{key: own.loc[metric, key] for key in told}}
    sign = 1.0 if metric in HIGHER_IS_BETTER else -1.0
    worse = sign * (np.asarray(full.loc[metric, "values"], float) - np.asarray(own.loc[metric, "values"], float))
    mean, half = worse.mean(), t95(len(worse) - 1) * worse.std(ddof=1) / len(worse) ** 0.5
    ends = {"value": mean, "ci_low": mean - half, "ci_high": mean + half, "n": len(worse)}
    yield {"metric": f"excess_{metric}", **ends, "values": worse.astype(np.float32)}
    held, whole = (float(each["value"].loc["state_bytes"]) for each in (own, full))
    share = held / whole
    yield {"metric": BYTES, "value": share, "ci_low": share, "ci_high": share, "n": 1, "values": None}
