"""What a sweep chose for each model and task, as a table; read from the records of the models that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contextlab.evaluation.intervals import Interval
from contextlab.report.naming import interval_in_words, metric_title

STOPPED = ("solved", "hopeless")
"""Why a training may have ended before its last step."""


def chosen_table(records: Sequence[Mapping[str, Any]], several_runs: bool = False) -> list[dict[str, str]]:
    """A row for each swept field of each model and task, as text: what was chosen, its score, its window, the trials.

    records: one mapping a training; those without a sweep are left out, and all seeds tell the same.

    Where trials were dropped before their end, score and window are of the step that "compared at" names: the last one
    at which all were scored.
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
                    "chosen": setting_in_words(value) + at_an_end(found, path, value) + _with_it(record, path),
                    "window": " to ".join(f"{end:g}" for end in dict.fromkeys(window)) if window else "",
                    f"{metric_title(found['metric'])} on validation": _score(chosen, found["metric"]),
                    **({"compared at": compared_at(found)} if found.get("halving") else {}),
                    "trials": _trials(found) + _stopped(found),
                }
            )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, "") for name in columns} for row in rows]


def compared_at(found: Mapping[str, Any]) -> str:
    """Where in training the trials of a sweep are compared: step 120 of 480, or the end."""
    return (found.get("halving") or {}).get("at") or "the end"


def _trials(found: Mapping[str, Any]) -> str:
    """How many there were, and how many of them went on at each rung: 8, then 4, then 2."""
    halving = found.get("halving")
    if not halving:
        return f"{found['trials']:,}"
    counts = [*(rung["trials"] for rung in halving["rungs"]), len(halving["left"])]
    return ", then ".join(f"{count:,}" for count in counts)


def at_an_end(found: Mapping[str, Any], path: str, value: Any) -> str:
    """Says of a number that was chosen that it is the smallest or the largest of three or more: try beyond it."""
    tried = {each["setting"].get(path) for each in found["curve"] if _is_number(each["setting"].get(path))}
    if len(tried) < 3 or value not in (min(tried), max(tried)):
        return ""
    return " (the largest tried)" if value == max(tried) else " (the smallest tried)"


def _with_it(record: Mapping[str, Any], path: str) -> str:
    """The fields that are tied to a swept one, with their values: ", with train.matrix_learning_rate 0.02"."""
    ties = record["sweep"].get("tied") or {}
    own = [f"{name} {setting_in_words(record['tied'][name])}" for name, tie in ties.items() if tie["to"] == path]
    return f", with {', '.join(own)}" if own else ""


def _stopped(found: Mapping[str, Any]) -> str:
    """How many trainings ended before their last step, and why: " (2 of 12 trainings stopped: hopeless)"."""
    why = [each for trial in found["curve"] for each in trial.get("stopped") or ()]
    told = [f"{why.count(name)} of {len(why)} trainings stopped: {name}" for name in STOPPED if name in why]
    return f" ({', '.join(told)})" if told else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def setting_in_words(value: Any) -> str:
    """A value of a field: 0.000316, 64, adamw."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _score(trial: Mapping[str, Any], metric: str) -> str:
    if trial["value"] is None:
        return "none"
    return interval_in_words(Interval.known(trial["value"], trial["ci_low"], trial["ci_high"]), metric)
