"""What the results say, in a small table for each task; `sentences` puts it in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation.intervals import Interval
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.digest import Digest
from contextlab.report.findings import Mean, without_number
from contextlab.report.merged import differing_trainings
from contextlab.report.naming import (
    NO_NUMBER,
    bytes_in_words,
    count_in_words,
    interval_in_words,
    label,
    metric_title,
)


def summary_table(
    results: pd.DataFrame,
    records: Sequence[Mapping[str, Any]],
    by_prompt: pd.DataFrame | None = None,
    digest: Digest | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Task -> rows by their values, the best known learner last; every cell is text, means with their intervals.

    Steps and numbers of seeds have columns where they differ among the models.

    results, records, by_prompt, digest: as `summary_words` takes them.
    """
    tables = {}
    digest = digest or Digest(results, by_prompt)
    several = digest.several
    for here in digest.findings:
        rows = digest.rows[here.task]
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
