"""How things are called in figures, tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation.intervals import Interval
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.words import bytes_in_words as bytes_in_words
from contextlab.words import count_in_words as count_in_words
from contextlab.words import listed

TITLES = {
    "squared_error": "squared error",
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy (nats)",
    "kl": "KL to the context's counts (nats)",
    "outside": "probability of no task's answer",
    "regret": "regret (reward lost so far)",
    "state_bytes": "bytes of state",
    "parameters": "parameters",
    "flops": "FLOPs of one forward",
    "prefill_seconds": "prefill (seconds)",
    "decode_seconds_per_token": "decoding (seconds a token)",
    "peak_bytes": "peak memory of prefill (bytes)",
    "training_seconds": "training (seconds)",
}
ONE_PROMPT, ALL_ALIKE, NO_NUMBER = "one prompt: no interval", "all alike", "no number"
"""What stands in the place of an interval, the last in that of a value, too."""
MANY = 6
"""Names that a sentence tells one by one; it counts the others."""
UNEVEN = 1.5
"""How much farther off one end of an interval is than the other, from which on both are told."""
ASIDE = ("cost", "online")
"""Splits that hold something else than predictions on prompts that were drawn."""
COST_METRICS = {"state_bytes", "parameters", "flops", "training_seconds"}

FACETS = {
    "position": "position in the prompt",
    "distance": "distance of the fact (tokens)",
    "depth": "depth in the computation",
    "digits": "digits of the longer operand",
    "digit": "digit of the number, from 0",
    "carries": "carries of the sum",
    "order": "order of the chain",
    "seen": "earlier occurrences of the last tokens",
    "copied": "copied back (1) or not (0)",
    "rank": "rank of the class (0: a new one)",
    "bursty": "bursty prompt (1) or not (0)",
    "overwritten": "binding overwritten (1) or not (0)",
}


def facet_title(facet: str) -> str:
    """A facet of the predictions in words."""
    return FACETS.get(facet, facet.replace("_", " "))


def metric_title(metric: str) -> str:
    """A metric in words."""
    if metric.startswith("excess_"):
        return f"excess {metric_title(metric.removeprefix('excess_'))} over the best known learner"
    return TITLES.get(metric, metric.replace("_", " "))


def value_in_words(value: float, metric: str, digits: str = ".3f") -> str:
    """A metric's value: a share in per cent, anything else with `digits`."""
    return f"{value:.1%}" if metric in HIGHER_IS_BETTER else f"{value:{digits}}"


def interval_in_words(told: Interval, metric: str) -> str:
    """A value with its interval: 0.050 ± 0.020, 97.0% ± 0.4%, 100.0% (≥ 99.6%) where it ends at a bound.

    Where one end is much farther off than the other, as of a perplexity on few prompts, both are told: 55 (12 to 251).
    One prompt has no interval, and where all are alike nothing is known of the spread: both are said.
    """
    value, low, high = told
    if math.isnan(value):
        return NO_NUMBER
    near, half = sorted((value - low, high - value))
    if not math.isfinite(half):
        return f"{value_in_words(value, metric, '.3g')} ({ONE_PROMPT})"
    if half <= 0:
        return f"{value_in_words(value, metric, '.3g')} ({ALL_ALIKE})"
    if metric in HIGHER_IS_BETTER:
        shown = f"{value:.1%}"
        if f"{low:.1%}" == shown == f"{high:.1%}":
            return f"{shown} ± <0.1%"
        if high > 0.9995:
            return f"{shown} (≥ {max(low, 0.0):.1%})" if low > 0.0005 else f"{shown} (0% to 100%)"
        if low < 0.0005:
            return f"{shown} (≤ {high:.1%})"
        inside = half <= min(value, 1 - value)
        return f"{shown} ± {percent(half)}%" if inside else f"{shown} ({low:.1%} to {high:.1%})"
    if half > UNEVEN * near and low > 0:
        return f"{_three(value)} ({_three(low)} to {_three(high)})"
    digits = min(max(0, 1 - math.floor(math.log10(half))), 12)
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def _three(value: float) -> str:
    """A number above 0 with three digits, or all of its whole ones."""
    return f"{value:,.0f}" if 999.5 <= value < 1e15 else f"{value:.3g}"


def percent(half: float) -> str:
    """A half-width in per cent: 0.4, or <0.1 where it is narrower than the digits."""
    return f"{100 * half:.1f}" if half >= 0.0005 else "<0.1"


def difference_in_words(told: Interval, metric: str) -> str:
    """What two differ by: 0.3 ± 0.7 points of a share, else in the metric's own unit."""
    if math.isnan(told.value):
        return "difference unknown"
    if told == (0.0, 0.0, 0.0):
        return "no difference on any prompt"
    if metric not in HIGHER_IS_BETTER:
        return f"difference {interval_in_words(told, metric)}"
    words = interval_in_words(Interval(*(100 * each for each in told)), "points")
    value, bracket, rest = words.partition(" (")
    return f"difference {value} points{bracket}{rest}"


def and_so_on(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown, more = names[:MANY], len(names) - MANY
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return listed(shown)


def axis_title(metric: str) -> str:
    """A metric in few words, for axes: they have less room."""
    if metric.startswith("excess_"):
        return f"excess {axis_title(metric.removeprefix('excess_'))}"
    return metric_title(metric)


def label(rows: pd.DataFrame, several: bool | None = None) -> pd.Series:
    """The names in figures: the model's, with the run's before it when there are several runs."""
    if several is None:
        several = rows["run"].nunique() > 1
    names = rows["model"].astype(str)
    return rows["run"].astype(str).str.cat(names, sep=": ") if several else names


def record_label(record: Mapping[str, Any], several: bool) -> str:
    """The same name for a training's record, whose key "run" tells the run."""
    return f"{record['run']}: {record['model']}" if several and "run" in record else str(record["model"])


def record_tasks(record: Mapping[str, Any]) -> list[str]:
    """The tasks that a training was on: of `multitask` several; runs of older versions tell their only one."""
    return list(record.get("tasks") or [record["task"]])


def main_metric(rows: pd.DataFrame) -> str:
    """The metric that a task is judged by: the first that evaluation wrote for it."""
    known = [m for m in dict.fromkeys(rows["metric"]) if not str(m).startswith("excess_") and m not in COST_METRICS]
    return str(known[0])
