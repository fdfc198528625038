"""What the results say, in a small table for each task; `sentences` puts it in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation import sample_complexity
from contextlab.evaluation.intervals import Interval
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.findings import Mean, findings, without_number
from contextlab.report.merged import differing_trainings
from contextlab.report.naming import (
    NO_NUMBER,
    bytes_in_words,
    count_in_words,
    interval_in_words,
    label,
    metric_title,
)

NEAR = (0.2, 0.1, 0.05)
"""Excess over the best learner, as parts of its own error, at which a model counts as near it; see `_scale`."""
NOTHING = 0.01
"""Part of its error with the fewest examples, below which the best learner makes none with the most: no yardstick."""
FEW_SHOTS = 4
"""Numbers of examples below which the examples that are needed tell nothing."""


def summary_table(
    results: pd.DataFrame, records: Sequence[Mapping[str, Any]], by_prompt: pd.DataFrame | None = None
) -> dict[str, list[dict[str, str]]]:
    """Task -> rows by their values, the best known learner last; every cell is text, means with their intervals.

    Steps and numbers of seeds have columns where they differ among the models.

    results, records, by_prompt: as `summary_words` takes them.
    """
    tables = {}
    several = results["run"].nunique() > 1
    for here in findings(results, by_prompt):
        rows = results[results["task"] == here.task]
        excess, regret = (
            {mean.label: mean for mean in found}
            for found in (here.of(f"excess_{here.metric}"), here.of("regret", "online"))
        )
        costs = {m: _cost(rows, m, several) for m in ("parameters", "state_bytes", "training_seconds")}
        trained = differing_trainings(records, here.task)
        titles = dict.fromkeys(title for each in trained.values() for title in each)
        shown = []
        ranked, best = here.ranked(here.metric), here.of(here.metric, kind="learner")[:1]
        lost = without_number(results, here.task, here.metric, several).keys() - {mean.label for mean in ranked}
        entries = [(mean.label, True, interval_in_words(mean.told, here.metric)) for mean in ranked]
        entries += [(name, True, NO_NUMBER) for name in sorted(lost)]
        entries += [(mean.label, False, interval_in_words(mean.told, here.metric)) for mean in best]
        for name, model, value in entries:
            shown.append(
                {
                    "model": name if model else f"{name} (best learner)",
                    metric_title(here.metric): value,
                    "excess (points)" if here.rising else "excess": _excess(excess[name])
                    if name in excess and model
                    else "",
                    **(
                        {"regret": interval_in_words(regret[name].told, "regret") if name in regret else ""}
                        if regret
                        else {}
                    ),
                    **dict.fromkeys(titles, ""),
                    **trained.get(name, {}),
                    "parameters": _told(costs["parameters"], name, count_in_words),
                    "state": _told(costs["state_bytes"], name, bytes_in_words),
                    "training": _told(
                        costs["training_seconds"], name, lambda s: f"{s:.2g} s" if s < 10 else f"{s:.0f} s"
                    ),
                }
            )
        tables[here.task] = shown
    return tables


def _cost(rows: pd.DataFrame, metric: str, several: bool) -> dict[str, float]:
    chosen = rows[(rows["metric"] == metric) & (rows["split"] == "cost")]
    named = chosen.assign(label=label(chosen, several))
    return {str(name): float(value) for name, value in named.groupby("label", sort=False)["value"].mean().items()}


def _told(values: Mapping[str, float], name: str, words: Any) -> str:
    return words(values[name]) if name in values else ""


def _plain(told: Interval) -> str:
    """A value that is no share, with its interval."""
    return interval_in_words(told, "")


def _excess(mean: Mean) -> str:
    """An excess with its interval; of shares in points."""
    points = 100 if mean.metric.removeprefix("excess_") in HIGHER_IS_BETTER else 1
    return _plain(Interval(*(points * each for each in mean.told)))


def example_table(rows: pd.DataFrame, metric: str) -> list[dict[str, str]]:
    """Sample complexity: the in-context examples from which on each predictor stays near the best known learner.

    rows: the results of one task. Near is an excess of 20%, 10% or 5% of the best learner's own error with the most
    examples (where it makes none then, with the fewest); of shares such as accuracy, that many points. Cells: the
    count, and in brackets what the ends of the intervals give. Empty where the prompts have few numbers of examples, or
    where no model comes near.
    """
    train = rows[(rows["split"] == "train") & rows["metric"].isin([metric, f"excess_{metric}"])]
    scale = _scale(train, metric)
    if scale is None or train["shot"].nunique() < FEW_SHOTS:
        return []
    best = train.loc[train["kind"] == "learner", "model"].iloc[0]
    several = rows["run"].nunique() > 1
    cells: dict[str, dict[str, str]] = {}
    reached = False
    for share in NEAR:
        found = sample_complexity(train, share * scale, metric)
        for (_, row), name in zip(found.iterrows(), label(found, several), strict=True):
            if row["kind"] == "learner" and row["model"] == best:
                continue
            reached |= row["kind"] == "model" and not pd.isna(row["examples"])
            title = f"within {share:.0%}" if metric in HIGHER_IS_BETTER else f"within {share * scale:.3g} ({share:.0%})"
            cells.setdefault(str(name), {"predictor": str(name)})[title] = _count(row)
    return list(cells.values()) if reached else []


def _count(row: pd.Series) -> str:
    """4 [3, 6]: the count, and those at the ends of the interval; "never" where there is none within the prompt."""
    value, low, high = (
        "never" if pd.isna(row[name]) else str(int(row[name])) for name in ("examples", "examples_low", "examples_high")
    )
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
