"""Sample complexity: how many in-context examples a predictor needs to come near the best known learner."""

from __future__ import annotations

import pandas as pd

from contextlab.errors import InputError, unknown
from contextlab.evaluation.results import summarise

KEYS = ("run", "model", "kind", "task", "split")
COLUMNS = (*KEYS, "metric", "excess", "examples", "examples_low", "examples_high")


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
    rows = results[results["metric"].str.startswith("excess_") & results["shot"].notna() & results["value"].notna()]
    known = list(dict.fromkeys(rows["metric"].str.removeprefix("excess_")))
    if metric is not None and metric not in known:
        raise InputError(f"metric: {unknown('metric with an excess by shot', metric, known)}")
    if not known:
        raise InputError("results hold no excess by shot; evaluate a task whose prompts have examples")
    found = []
    for key, group in summarise(rows).groupby(list(KEYS), sort=False, dropna=False):
        chosen = f"excess_{metric}" if metric is not None else group["metric"].iloc[0]
        curve = group[group["metric"] == chosen].sort_values("shot")
        if not curve.empty:
            ends = {"examples": "value", "examples_low": "ci_low", "examples_high": "ci_high"}
            counts = {name: _reached(curve["shot"], curve[end] <= excess) for name, end in ends.items()}
            row = dict(zip(KEYS, key, strict=True))
            found.append({**row, "metric": chosen.removeprefix("excess_"), "excess": excess, **counts})
    whole = dict.fromkeys(("examples", "examples_low", "examples_high"), "Int64")
    return pd.DataFrame(found, columns=list(COLUMNS)).astype(whole)


def _reached(shots: pd.Series, near: pd.Series) -> int | None:
    """The first shot from which on all are near."""
    stays = near[::-1].cummin()
    return int(shots[stays[stays].index].min()) if stays.any() else None
