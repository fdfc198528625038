"""Several tasks at a glance: the table that a suite is read by, tasks by models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from contextlab.evaluation import summarise
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.naming import ASIDE, label, main_metric, metric_title, value_in_words

TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000)
FEWEST = 3
"""Tasks from which on a table of all of them helps."""


def suite_values(results: pd.DataFrame) -> pd.DataFrame:
    """One row a task and model or best known learner, on prompts as in training, seeds put together.

    results: of a run. Returns columns task, metric, name, kind ("model" or "learner") and value, in the order of the
    results; empty where there are fewer than `FEWEST` tasks or fewer than two models.
    """
    found = []
    for task, rows in results.groupby("task", sort=False):
        if rows["split"].isin(ASIDE).all():
            continue
        metric = main_metric(rows)
        chosen = rows[(rows["metric"] == metric) & rows["shot"].isna() & rows["value"].notna()]
        means = summarise(chosen[chosen["split"] == "train"])
        means = means.assign(name=label(means, results["run"].nunique() > 1))
        learners = means[means["kind"] == "learner"].head(1)  # the best known is written first
        for _, row in pd.concat([means[means["kind"] == "model"], learners]).iterrows():
            found.append({"task": task, "metric": metric, **row[["name", "kind", "value"]].to_dict()})
    values = pd.DataFrame(found, columns=["task", "metric", "name", "kind", "value"])
    models = values.loc[values["kind"] == "model", "name"].nunique()
    return values if values["task"].nunique() >= FEWEST and models > 1 else values.head(0)


def suite_table(results: pd.DataFrame) -> list[dict[str, str]]:
    """Tasks by models, every cell text, with the mean over the tasks where all are told in accuracy.

    The last column is that of the learner held to be best, whose name it tells; where it is an approximation, such as
    votes of formulas drawn at random, a model may beat it. Empty as `suite_values` is.
    """
    values = suite_values(results)
    if values.empty:
        return []
    models = list(dict.fromkeys(values.loc[values["kind"] == "model", "name"]))
    first = str(values["metric"].iloc[0])
    shared = values["metric"].nunique() == 1
    head = f"task ({metric_title(first)})" if shared else "task"
    table = []
    for task, rows in values.groupby("task", sort=False):
        metric = str(rows["metric"].iloc[0])
        value = rows[rows["kind"] == "model"].set_index("name")["value"]
        row = {head: str(task)} | ({} if shared else {"metric": metric_title(metric)})
        row |= {name: value_in_words(value[name], metric) if name in value.index else "" for name in models}
        best = rows[rows["kind"] == "learner"]
        row["reference learner"] = "".join(
            f"{value_in_words(float(b['value']), metric)} {b['name']}" for _, b in best.iterrows()
        )
        table.append(row)
    if shared and first in HIGHER_IS_BETTER:  # errors of different tasks have no common scale
        means = values.pivot_table(index="task", columns="name", values="value")
        whole = {name: value_in_words(means[name].mean(), first) for name in models if means[name].notna().all()}
        table.append({head: "mean"} | {name: whole.get(name, "") for name in models} | {"reference learner": ""})
    return table


def suite_figure(results: pd.DataFrame, styles: Mapping[str, Mapping[str, Any]]) -> go.Figure | None:
    """Tasks by models as dots: accuracies, or errors as multiples of the best known learner's; None without a table.

    styles: name -> "colour" of the model, as `report.figures.styles` gives them.
    """
    values = suite_values(results)
    if values.empty:
        return None
    rising = values["metric"].isin(HIGHER_IS_BETTER)
    if rising.nunique() > 1:
        return None
    best = values[values["kind"] == "learner"].set_index("task")["value"]
    figure = go.Figure()
    for name, rows in values[values["kind"] == "model"].groupby("name", sort=False):
        at = rows["value"] if rising.all() else rows["value"] / rows["task"].map(best)
        figure.add_scatter(
            x=at, y=rows["task"], mode="markers", name=str(name),
            marker={"size": 11, "color": styles.get(str(name), {}).get("colour"), "opacity": 0.85},
        )  # fmt: skip
    if rising.all():
        figure.add_scatter(
            x=best, y=best.index, mode="markers", name="best known learner",
            marker={"symbol": "line-ns-open", "size": 16, "color": "#444"},
        )  # fmt: skip
        figure.update_xaxes(title=metric_title(str(values["metric"].iloc[0])), tickformat=".0%", rangemode="tozero")
    else:
        figure.add_vline(x=1, line={"color": "#444", "dash": "dot"})
        figure.update_xaxes(title="error, as a multiple of the best known learner's", type="log", tickvals=TICKS)
    figure.update_yaxes(autorange="reversed", title="")
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.25}, margin={"t": 20, "r": 20})
    return figure
