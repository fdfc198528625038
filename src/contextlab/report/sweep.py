"""What a sweep chose for each model and task, as a table; read from the records of the models that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contextlab.report.naming import metric_title, value_in_words


def chosen_table(records: Sequence[Mapping[str, Any]], several_runs: bool = False) -> list[dict[str, str]]:
    """A row for each swept field of each model and task, as text: what was chosen, its score, its window, the trials.

    records: one mapping a training; those without a sweep are left out, and all seeds tell the same.
    """
    rows = []
    seen = set()
    for record in records:
        found = record.get("sweep")
        key = (record.get("run"), record["task"], record["model"])
        if not found or key in seen:
            continue
        seen.add(key)
        chosen = found["curve"][record["trial"]]
        for path, value in record["setting"].items():
            window = found["windows"].get(path)
            rows.append(
                {
                    **({"run": str(record["run"])} if several_runs and "run" in record else {}),
                    "task": str(record["task"]),
                    "model": str(record["model"]),
                    "field": path,
                    "chosen": setting_in_words(value),
                    "window": f"{window[0]:g} to {window[1]:g}" if window else "",
                    f"{metric_title(found['metric'])} on validation": _score(chosen, found["metric"]),
                    "trials": f"{found['trials']:,}",
                }
            )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, "") for name in columns} for row in rows]


def setting_in_words(value: Any) -> str:
    """A value of a field: 0.000316, 64, adamw."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _score(trial: Mapping[str, Any], metric: str) -> str:
    if trial["value"] is None:
        return "none"
    shown = value_in_words(trial["value"], metric)
    half = (trial["ci_high"] - trial["ci_low"]) / 2
    return f"{shown} ± {value_in_words(half, metric)}"
