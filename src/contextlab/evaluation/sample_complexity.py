"""Sample complexity: how many in-context examples a predictor needs to come near the best known learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from contextlab.errors import InputError, unknown
from contextlab.evaluation.results import summarise

KEYS = ("run", "model", "kind", "task", "split")
COLUMNS = (*KEYS, "metric", "excess", "examples", "examples_low", "examples_high")
ENDS = {"examples": "value", "examples_low": "ci_low", "examples_high": "ci_high"}


@dataclass(frozen=True)
class ExcessCurve:
    """How far one predictor is above the best known learner, by the number of examples.

    who: its run, model, kind, task and split. metric: whose excess it is. shots: numbers of examples, rising. ends: the
    excess after each, and the lower and the upper ends of its interval, by the names in `ENDS`.
    """

    who: dict[str, Any]
    metric: str
    shots: np.ndarray
    ends: dict[str, np.ndarray]

    def examples(self, excess: float) -> dict[str, int | None]:
        """The examples from which on each end stays at or below an excess; None where it never does for good."""
        found: dict[str, int | None] = {}
        for name, values in self.ends.items():
            stays = np.logical_and.accumulate(values[::-1] <= excess)[::-1]
            found[name] = int(self.shots[stays].min()) if stays.any() else None
        return found


def sample_complexity(results: pd.DataFrame, excess: float, metric: str | None = None) -> pd.DataFrame:
    """The least number of examples from which on the excess over the best known learner stays at or below `excess`.

    results: of `evaluate` or `evaluate_learners`; several seeds are put together (see `summarise`).
    excess: in the metric's unit.
    metric: whose excess is meant, such as "squared_error"; None for the first of each task.

    Returns a row a run, model, task and split: `examples`, and `examples_low` and `examples_high`, what the lower and
    upper ends of the intervals give: at least and at most so many. Missing where the excess is never reached for good
    within the prompt. Raises InputError where results hold no excess by shot.
    """
    if excess < 0:
        raise InputError(
            f"excess {excess:g} is below zero; give the distance from the best learner that counts as near"
        )
    found = [
        {**each.who, "metric": each.metric, "excess": excess, **each.examples(excess)}
        for each in excess_curves(results, metric)
    ]
    return pd.DataFrame(found, columns=list(COLUMNS)).astype(dict.fromkeys(ENDS, "Int64"))


def excess_curves(results: pd.DataFrame, metric: str | None = None) -> list[ExcessCurve]:
    """The curves from which `sample_complexity` is read, which takes and raises the same.

    results: may be put together already, by `summarise`.
    """
    rows = results[results["metric"].str.startswith("excess_") & results["shot"].notna() & results["value"].notna()]
    known = list(dict.fromkeys(rows["metric"].str.removeprefix("excess_")))
    if metric is not None and metric not in known:
        raise InputError(f"metric: {unknown('metric with an excess by shot', metric, known)}")
    if not known:
        raise InputError("results hold no excess by shot; evaluate a task whose prompts have examples")
    means = rows if "seeds" in rows else summarise(rows)
    curves: dict[tuple[Any, ...], dict[str, list[tuple[int, float, float, float]]]] = {}
    for *key, name, shot, value, low, high in means[[*KEYS, "metric", "shot", *ENDS.values()]].itertuples(index=False):
        curves.setdefault(tuple(key), {}).setdefault(str(name), []).append((int(shot), value, low, high))
    found = []
    for who, by_metric in curves.items():
        chosen = f"excess_{metric}" if metric is not None else next(iter(by_metric))
        if chosen in by_metric:
            shots, *ends = zip(*sorted(by_metric[chosen], key=lambda row: row[0]), strict=True)
            values = dict(zip(ENDS, map(np.array, ends), strict=True))
            named = dict(zip(KEYS, who, strict=True))
            found.append(ExcessCurve(named, chosen.removeprefix("excess_"), np.array(shots), values))
    return found
