"""The figure of a sweep: validation quality by each swept number, a line for each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from contextlab.registry import register
from contextlab.report.drawing import draw_line, finish, styles
from contextlab.report.naming import axis_title, metric_title, record_label, record_tasks
from contextlab.report.sections import Drawn, TaskData
from contextlab.report.sketch import Sketch
from contextlab.report.sweep import compared_at

LOGARITHMIC = 8.0
"""A field whose largest number is so many times its smallest has a logarithmic axis."""

MOST_POINTS = 200
"""Of a line; a report of more would not be read, and be too large."""

UNSEEN: Mapping[str, Any] = {"colour": "#000000", "dash": "solid", "marker": "circle"}
"""How a model looks that has no results, as it diverged in the end."""


@register("figure", "sweep", family="training")
def by_swept_field(data: TaskData) -> list[Drawn]:
    """The metric on validation prompts by each field that was swept over numbers."""
    several = data.results["run"].nunique() > 1
    found: dict[str, Mapping[str, Any]] = {}  # of each model one record: all seeds tell the same
    for record in data.records:
        if record.get("sweep") and data.task in record_tasks(record):
            found.setdefault(record_label(record, several), record)
    paths = dict.fromkeys(path for record in found.values() for path in record["setting"])
    drawn = []
    for path in paths:
        lines = {name: line for name, record in found.items() if len(line := _line(record["sweep"], path)) > 1}
        metrics = {name: str(found[name]["sweep"]["metric"]) for name in lines}
        for metric in dict.fromkeys(metrics.values()):
            of_metric = {name: line for name, line in lines.items() if metrics[name] == metric}
            places = {name: compared_at(found[name]["sweep"]) for name in of_metric}
            drawn.append(_drawn(data, path, of_metric, metric, places))
    return drawn


def profile(sweep: Mapping[str, Any], path: str) -> pd.DataFrame:
    """The best trial at each number of a field, by columns at, value, ci_low, ci_high; whole trials only."""
    sign = -1 if sweep["higher_is_better"] else 1
    best: dict[float, Mapping[str, Any]] = {}
    for trial in sweep["curve"]:
        at = trial["setting"].get(path)
        if isinstance(at, bool) or not isinstance(at, int | float) or trial["value"] is None:
            continue
        whole = set(trial["statuses"]) == {"finished"}
        if trial.get("missing", 0 if whole else 1) == 0 and (
            at not in best or sign * trial["value"] < sign * best[at]["value"]
        ):
            best[at] = trial
    columns = ("value", "ci_low", "ci_high")
    return pd.DataFrame([{"at": at, **{name: best[at][name] for name in columns}} for at in sorted(best)])


def _line(sweep: Mapping[str, Any], path: str) -> pd.DataFrame:
    """What is drawn of a profile: where it has thousands of points, the best of each few neighbours."""
    whole = profile(sweep, path)
    if len(whole) <= MOST_POINTS:
        return whole
    quality = whole["value"] if sweep["higher_is_better"] else -whole["value"]
    best = quality.groupby(np.arange(len(whole)) * MOST_POINTS // len(whole)).idxmax()
    return whole.loc[best].reset_index(drop=True)


def _drawn(
    data: TaskData, path: str, lines: Mapping[str, pd.DataFrame], metric: str, places: Mapping[str, str]
) -> Drawn:
    look = styles(data.results)
    figure = Sketch()
    for name, line in lines.items():
        draw_line(figure, line, line["at"].tolist(), name, "model", look.get(name, UNSEEN))
    finish(figure, path, f"{axis_title(metric)} on validation")
    early = {name: place for name, place in places.items() if place != "the end"}
    same = len(set(places.values())) == 1
    numbers = sorted({at for line in lines.values() for at in line["at"]})
    if numbers[0] > 0 and numbers[-1] >= LOGARITHMIC * numbers[0]:
        figure.update_xaxes(type="log")
    if len(numbers) <= 8:
        figure.update_xaxes(tickvals=numbers, ticktext=[f"{at:.3g}" for at in numbers])
    title = f"{metric_title(metric).capitalize()} by {path}"
    note = (
        "Each trial's mean over seeds on the validation prompts, by which the best was chosen; where other fields "
        "were swept too, that of the best of their values. Bands: 95% intervals."
        + f" Of more than {MOST_POINTS} values, the best among neighbours."
        * (len(numbers) >= MOST_POINTS)
    )
    if early:
        where = next(iter(early.values())) if same else "; ".join(f"{name}: {place}" for name, place in early.items())
        note += f" Scores are of the last step at which all trials were compared, before any was dropped ({where})."
    return Drawn(title, figure, note)
