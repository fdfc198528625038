"""How many in-context examples bring each predictor near the best known learner, as a table."""

from __future__ import annotations

import pandas as pd

from contextlab.evaluation.sample_complexity import excess_curves
from contextlab.prompt import HIGHER_IS_BETTER

NEAR = (0.2, 0.1, 0.05)
"""Excess over the best learner, as parts of its own error, at which a model counts as near it; see `_scale`."""
NOTHING = 0.01
"""Part of its error with the fewest examples, below which the best learner makes none with the most: no yardstick."""
FEW_SHOTS = 4
"""Numbers of examples below which the examples that are needed tell nothing."""


def example_table(rows: pd.DataFrame, metric: str, means: pd.DataFrame | None = None) -> list[dict[str, str]]:
    """Sample complexity: the in-context examples from which on each predictor stays near the best known learner.

    rows: the results of one task. Near is an excess of 20%, 10% or 5% of the best learner's own error with the most
    examples (where it makes none then, with the fewest); of shares such as accuracy, that many points. Cells: the
    count, and in brackets what the ends of the intervals give. Empty where the prompts have few numbers of examples, or
    where no model comes near. means: the rows with their seeds put together, where these are known (see `summarise`).
    """
    train = _train(rows, metric)
    scale = _scale(train, metric)
    if scale is None or train["shot"].nunique() < FEW_SHOTS:
        return []
    best = train.loc[train["kind"] == "learner", "model"].iloc[0]
    several = rows["run"].nunique() > 1
    cells: dict[str, dict[str, str]] = {}
    reached = False
    for curve in excess_curves(train if means is None else _train(means, metric), metric):
        who = curve.who
        if who["kind"] == "learner" and who["model"] == best:
            continue
        name = f"{who['run']}: {who['model']}" if several else str(who["model"])
        for share in NEAR:
            counts = curve.examples(share * scale)
            reached |= who["kind"] == "model" and counts["examples"] is not None
            title = f"within {share:.0%}" if metric in HIGHER_IS_BETTER else f"within {share * scale:.3g} ({share:.0%})"
            cells.setdefault(name, {"predictor": name})[title] = _count(counts)
    return list(cells.values()) if reached else []


def _train(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What is told of a metric and its excess on prompts as in training."""
    return rows[(rows["split"] == "train") & rows["metric"].isin([metric, f"excess_{metric}"])]


def _count(counts: dict[str, int | None]) -> str:
    """4 [3, 6]: the count, and those at the ends of the interval; "never" where there is none within the prompt."""
    value, low, high = ("never" if count is None else str(count) for count in counts.values())
    return value if value == low == high else f"{value} [{low}, {high}]"


def _scale(train: pd.DataFrame, metric: str) -> float | None:
    """What an excess is held against: of errors, the best learner's with the most examples; of shares, 1.

    Where it makes next to no error then, as without noise, its error with the fewest.
    """
    if metric in HIGHER_IS_BETTER:
        return 1.0 if (train["kind"] == "learner").any() else None
    learners = train[(train["kind"] == "learner") & (train["metric"] == metric) & train["shot"].notna()]
    if learners.empty:
        return None
    errors = learners[learners["model"] == learners["model"].iloc[0]].sort_values("shot")["value"]
    first, last = float(errors.iloc[0]), float(errors.iloc[-1])
    scale = last if last > NOTHING * first else first
    return scale if scale > 0 else None
