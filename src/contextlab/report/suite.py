"""Several tasks at a glance: the table that a suite is read by, tasks by models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from contextlab.evaluation.intervals import Interval
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.digest import Digest
from contextlab.report.naming import interval_in_words, metric_title
from contextlab.report.sketch import Sketch

if TYPE_CHECKING:
    import plotly.graph_objects as go

TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000)
FEWEST = 3
"""Tasks from which on a table of all of them helps."""


def suite_values(
    results: pd.DataFrame, by_prompt: pd.DataFrame | None = None, digest: Digest | None = None
) -> pd.DataFrame:
    """One row a task and model or best known learner, on prompts as in training, seeds put together.

    results, by_prompt, digest: of a run, as `summary_words` takes them. Returns columns task, metric, name, kind
    ("model" or "learner"), value and told, the value with its interval, in the order of the results; empty where there
    are fewer than `FEWEST` tasks or fewer than two models.
    """
    found = []
    for here in (digest or Digest(results, by_prompt)).findings:
        learners = here.of(here.metric, kind="learner")[:1]  # the best known is written first
        for mean in [*here.of(here.metric, kind="model"), *learners]:
            row = {"task": here.task, "metric": here.metric, "name": mean.label, "kind": mean.kind}
            found.append({**row, "value": mean.value, "told": mean.told})
    values = pd.DataFrame(found, columns=["task", "metric", "name", "kind", "value", "told"])
    models = values.loc[values["kind"] == "model", "name"].nunique()
    return values if values["task"].nunique() >= FEWEST and models > 1 else values.head(0)


def suite_table(
    results: pd.DataFrame, by_prompt: pd.DataFrame | None = None, digest: Digest | None = None
) -> list[dict[str, str]]:
    """Tasks by models, every cell text, means with their intervals; and their mean over the tasks where all are told in
    accuracy, with an interval for these tasks.

    The last column is that of the learner held to be best, whose name it tells; where it is an approximation, such as
    votes of formulas drawn at random, a model may beat it. Empty as `suite_values` is.
    """
    values = suite_values(results, by_prompt, digest)
    if values.empty:
        return []
    models = list(dict.fromkeys(values.loc[values["kind"] == "model", "name"]))
    first = str(values["metric"].iloc[0])
    shared = values["metric"].nunique() == 1
    head = f"task ({metric_title(first)})" if shared else "task"
    table = []
    for task, rows in values.groupby("task", sort=False):
        metric = str(rows["metric"].iloc[0])
        told: dict[str, Interval] = dict(rows.loc[rows["kind"] == "model", ["name", "told"]].itertuples(index=False))
        row = {head: str(task)} | ({} if shared else {"metric": metric_title(metric)})
        row |= {name: interval_in_words(told[name], metric) if name in told else "" for name in models}
        best = rows[rows["kind"] == "learner"]
        row["reference learner"] = "".join(
            f"{interval_in_words(b['told'], metric)} {b['name']}" for _, b in best.iterrows()
        )
        table.append(row)
    if shared and first in HIGHER_IS_BETTER:  # errors of different tasks have no common scale
        own = {name: values.loc[values["name"] == name, "told"].tolist() for name in models}
        tasks = values["task"].nunique()
        whole = {name: interval_in_words(_mean(told), first) for name, told in own.items() if len(told) == tasks}
        table.append({head: "mean"} | {name: whole.get(name, "") for name in models} | {"reference learner": ""})
    return table


def _mean(told: Sequence[Interval]) -> Interval:
    """The mean over these tasks, whose prompts and trainings are independent."""
    value = sum(each.value for each in told) / len(told)
    below, above = (math.hypot(*(each[at] - each.value for each in told)) / len(told) for at in (1, 2))
    return Interval(value, max(value - below, 0.0), min(value + above, 1.0))


def suite_figure(
    results: pd.DataFrame, styles: Mapping[str, Mapping[str, Any]], by_prompt: pd.DataFrame | None = None
) -> go.Figure | None:
    """Tasks by models as dots with their intervals: accuracies, or errors as multiples of the best known learner's.

    None without a table.

    styles: name -> "colour" of the model, as `report.figures.styles` gives them.
    """
    found = suite_sketch(results, styles, by_prompt)
    return None if found is None else found.plotly()


def suite_sketch(
    results: pd.DataFrame,
    styles: Mapping[str, Mapping[str, Any]],
    by_prompt: pd.DataFrame | None = None,
    digest: Digest | None = None,
) -> Sketch | None:
    """`suite_figure` as plain data."""
    values = suite_values(results, by_prompt, digest)
    if values.empty:
        return None
    rising = values["metric"].isin(HIGHER_IS_BETTER)
    if rising.nunique() > 1:
        return None
    best = values[values["kind"] == "learner"].set_index("task")["value"]
    figure = Sketch()
    for name, rows in values[values["kind"] == "model"].groupby("name", sort=False):
        scale = 1.0 if rising.all() else rows["task"].map(best)
        low, high = (rows["told"].map(lambda told, at=at: told[at]) for at in (1, 2))
        figure.add_scatter(
            x=rows["value"] / scale, y=rows["task"], mode="markers", name=str(name),
            marker={"size": 11, "color": styles.get(str(name), {}).get("colour"), "opacity": 0.85},
            error_x={
                "type": "data", "array": (high - rows["value"]) / scale, "arrayminus": (rows["value"] - low) / scale,
                "thickness": 1, "width": 3,
            },
        )  # fmt: skip
    if rising.all():
        figure.add_scatter(
            x=best, y=best.index, mode="markers", name="best known learner",
            marker={"symbol": "line-ns-open", "size": 16, "color": "#444"},
        )  # fmt: skip
        figure.update_xaxes(
            title={"text": metric_title(str(values["metric"].iloc[0]))}, tickformat=".0%", rangemode="tozero"
        )
    else:
        figure.add_vline(x=1, line={"color": "#444", "dash": "dot"})
        figure.update_xaxes(
            title={"text": "error, as a multiple of the best known learner's"}, type="log", tickvals=TICKS
        )
    figure.update_yaxes(autorange="reversed", title={"text": ""})
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.25}, margin={"t": 20, "r": 20})
    return figure
