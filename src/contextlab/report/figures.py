"""Figures: each function takes tidy results (or records) and returns a Plotly figure; see `sketch.drawing`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation.intervals import Interval
from contextlab.report.crowd import by_family, many_against_state
from contextlab.report.drawing import (
    best_learner,
    byte_axis,
    draw_line,
    finish,
    is_far,
    lines_of,
    rows_of,
    span,
    styles,
    value_axis,
)
from contextlab.report.grids import heat_map as heat_map
from contextlab.report.grids import similarity_map as similarity_map
from contextlab.report.naming import ASIDE, axis_title, facet_title, label, metric_title, record_tasks
from contextlab.report.sketch import Sketch, drawing

Told = Mapping[tuple[str, str, str], Interval]
"""Label of a predictor, split and metric -> the mean over whole prompts, with its interval over prompts and seeds."""


@drawing
def curve(
    results: pd.DataFrame, task: str, metric: str, split: str = "train", means: pd.DataFrame | None = None
) -> Sketch:
    """A metric by the number of in-context examples, with 95% bands; models solid, learners dashed and grey.

    split: "online" has the steps played in place of examples. means: the results that are numbers with their seeds put
    together (see `summarise`), where these are known.
    """
    look = styles(results)
    rows = rows_of(results, task, metric, split, means=means)
    rows = rows[rows["shot"].notna()].sort_values("shot", kind="stable")
    figure = Sketch()
    for name, kind, line in lines_of(rows):
        draw_line(figure, line, line["shot"].astype(int).tolist(), name, kind, look[name], hidden=is_far(rows, line))
    finish(figure, "steps played" if split == "online" else "in-context examples", axis_title(metric))
    value_axis(figure, metric, rows["value"], axis="y")
    return by_family(figure, look)


@drawing
def by_facet(
    results: pd.DataFrame, facets: pd.DataFrame, task: str, facet: str, metric: str, split: str = "train"
) -> Sketch:
    """A metric by a facet of the predictions, such as the distance of the fact: a place for each group of its values.

    results: from which the models' looks are taken. facets: a table of facets (see `evaluation.measure`).
    """
    look = styles(results)
    chosen = facets[(facets["facet"] == facet) & (facets["metric"] == metric)]
    rows = rows_of(chosen, task, metric, split, several=results["run"].nunique() > 1).sort_values("low", kind="stable")
    lines = list(lines_of(rows))
    # Prompts drawn on another device can have other groups: these take the places of the ones that they fall into.
    _, _, first = max(lines, key=lambda each: (each[1] == "model", len(each[2])))
    starts = first["low"].to_numpy()
    figure = Sketch()
    for name, kind, line in lines:
        middle = ((line["low"] + line["high"]) / 2).to_numpy()
        places = (starts.searchsorted(middle, side="right") - 1).clip(0).tolist()
        spans = [span(low, high) for low, high in zip(line["low"], line["high"], strict=True)]
        draw_line(figure, line, places, name, kind, look[name], hidden=is_far(rows, line), told=spans)
    figure = finish(figure, facet_title(facet), axis_title(metric))
    ticks = [span(low, high) for low, high in zip(first["low"], first["high"], strict=True)]
    figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks)
    figure.update_layout(height=360)
    value_axis(figure, metric, rows["value"], axis="y")
    return by_family(figure, look)


def lengths(results: pd.DataFrame, task: str) -> dict[int, str]:
    """The tokens of prompts in the results of a task -> the first split of prompts so long; 'train' before others."""
    rows = results[(results["task"] == task) & ~results["split"].isin(ASIDE) & (results["n"] > 0)]
    found: dict[int, str] = {}
    for split, length in sorted(
        rows[["split", "length"]].drop_duplicates().itertuples(index=False), key=lambda each: each[0] != "train"
    ):
        found.setdefault(int(length), str(split))
    return dict(sorted(found.items()))


@drawing
def by_length(results: pd.DataFrame, task: str, metric: str, means: pd.DataFrame | None = None) -> Sketch:
    """A metric, the mean over the prompt, by the tokens of the prompt: 'train', and a split of each other length.

    means: as `curve` takes them.
    """
    look, shown = styles(results), lengths(results, task)
    rows = rows_of(results, task, metric, None, means=means)
    rows = rows[rows["shot"].isna() & (rows["length"].map(shown) == rows["split"])]
    best = best_learner(rows)
    figure = Sketch()
    for name, kind, line in lines_of(rows.sort_values("length", kind="stable")):
        places = line["length"].astype(int).tolist()
        draw_line(figure, line, places, name, kind, look[name], hidden=kind == "learner" and name != best,
              told=line["split"].tolist())  # fmt: skip
    figure = finish(figure, "tokens in the prompt", metric_title(metric))
    figure.update_xaxes(type="log", tickvals=list(shown), ticktext=[f"{each:,}" for each in shown])
    figure.update_layout(height=360)
    value_axis(figure, metric, rows["value"], axis="y")
    return by_family(figure, look)


@drawing
def by_split(
    results: pd.DataFrame, task: str, metric: str, told: Told | None = None, means: pd.DataFrame | None = None
) -> Sketch:
    """A metric on every split of the task: one row a split, one mark a model, with 95% intervals.

    told: the intervals over prompts and seeds, by label, split and metric; those of `summarise` where there are none.
    means: as `curve` takes them.
    """
    look = styles(results)
    rows = rows_of(results, task, metric, None, means=means)
    rows = _with_told(rows[rows["shot"].isna() & ~rows["split"].isin(ASIDE)], told)
    if metric.startswith("excess_"):
        rows = rows[rows["kind"] == "model"]
    else:
        best = best_learner(rows)
        rows = rows[(rows["kind"] == "model") | (rows["label"] == best)]
    splits = list(dict.fromkeys(rows["split"]))
    figure = Sketch()
    for name, marks in rows.groupby("label", sort=False):
        style = look[str(name)]
        figure.add_scatter(
            x=marks["value"].tolist(),
            y=marks["split"].tolist(),
            name=str(name),
            mode="markers",
            marker={"color": style["colour"], "symbol": style["marker"], "size": 11},
            error_x={
                "type": "data",
                "array": (marks["ci_high"] - marks["value"]).tolist(),
                "arrayminus": (marks["value"] - marks["ci_low"]).tolist(),
                "color": style["colour"],
            },
        )
    figure = finish(figure, axis_title(metric), "")
    figure.update_yaxes(categoryorder="array", categoryarray=splits[::-1], type="category")
    figure.update_layout(height=220 + 44 * len(splits))
    value_axis(figure, metric, rows["value"], axis="x")
    return by_family(figure, look)


@drawing
def quality_against_state(
    results: pd.DataFrame,
    task: str,
    metric: str,
    split: str = "train",
    told: Told | None = None,
    means: pd.DataFrame | None = None,
) -> Sketch:
    """A metric against the bytes of state that one sequence of the task leaves; the best learner as a line.

    told: as `by_split` takes it. means: as `curve` takes them.
    """
    look = styles(results)
    rows = rows_of(results, task, metric, split, means=means)
    rows = _with_told(rows[rows["shot"].isna()], told)
    costs = rows_of(results, task, "state_bytes", "cost", means=means).set_index("label")["value"]
    models = rows[(rows["kind"] == "model") & rows["label"].isin(costs.index)]
    family = {name: each["family"] for name, each in look.items() if "family" in each}
    if family:
        figure = many_against_state.sketch(models.assign(bytes=models["label"].map(costs)), family, metric)
        return _with_best(figure, rows)
    figure = Sketch()
    for _, row in models.iterrows():
        style = look[row["label"]]
        figure.add_scatter(
            x=[costs[row["label"]]],
            y=[row["value"]],
            name=row["label"],
            mode="markers",
            marker={"color": style["colour"], "symbol": style["marker"], "size": 13},
            error_y={
                "type": "data",
                "array": [row["ci_high"] - row["value"]],
                "arrayminus": [row["value"] - row["ci_low"]],
                "color": style["colour"],
            },
        )
    finish(figure, "bytes of state at the end of a prompt", metric_title(metric))
    byte_axis(figure, models["label"].map(costs))
    value_axis(figure, metric, rows["value"], axis="y")
    return _with_best(figure, rows)


def _with_told(rows: pd.DataFrame, told: Told | None) -> pd.DataFrame:
    """Rows of whole prompts with the intervals that are known better; the same that tables and sentences have."""
    keys = zip(rows["label"], rows["split"], rows["metric"], strict=True)
    known = [(told or {}).get((str(a), str(b), str(c))) for a, b, c in keys]
    ends = {
        name: [
            old if each is None or not math.isfinite(each[at]) else each[at]
            for old, each in zip(rows[name], known, strict=True)
        ]
        for at, name in ((1, "ci_low"), (2, "ci_high"))
    }
    return rows.assign(**ends)


def _with_best(figure: Sketch, rows: pd.DataFrame) -> Sketch:
    """The best known learner as a line."""
    best = best_learner(rows)
    if best is not None:
        level = float(rows.loc[rows["label"] == best, "value"].iloc[0])
        figure.add_hline(y=level, line={"dash": "dash", "color": "#444444"}, annotation_text=best)
    return figure


@drawing
def training_curves(results: pd.DataFrame, records: Sequence[Mapping[str, Any]], task: str) -> Sketch:
    """The training loss by step, one line a training; on several tasks it is that of the task whose turn it was."""
    look = styles(results)
    figure = Sketch()
    shown = set()
    for record in records:
        history = record.get("history")
        if task not in record_tasks(record) or not history or not history["step"]:
            continue
        name = record.get("label") or record["model"]
        style = look.get(name, {"colour": "#444444", "dash": "dot"})
        figure.add_scatter(
            x=history["step"],
            y=history["loss"],
            name=name,
            legendgroup=name,
            showlegend=name not in shown,
            mode="lines",
            line={"color": style["colour"], "dash": style["dash"], "width": 1.5},
        )
        shown.add(name)
    figure = finish(figure, "training step", "training loss")
    figure.update_yaxes(type="log")
    return by_family(figure, look)


@drawing
def cost_by_length(results: pd.DataFrame, metric: str) -> Sketch:
    """A cost by context length on logarithmic axes; the whiskers go from the least to the most that was measured."""
    rows = results[(results["metric"] == metric) & (results["split"] == "cost")]
    rows = rows.assign(label=label(rows, results["run"].nunique() > 1))
    look = styles(results)
    figure = Sketch()
    for name, line in rows.groupby("label", sort=False):
        line, style = line.sort_values("length"), look[str(name)]
        figure.add_scatter(
            x=line["length"].astype(int).tolist(),
            y=line["value"].tolist(),
            name=str(name),
            mode="lines+markers",
            line={"color": style["colour"]},
            marker={"symbol": style["marker"], "size": 9},
            error_y={
                "type": "data",
                "array": (line["ci_high"] - line["value"]).tolist(),
                "arrayminus": (line["value"] - line["ci_low"]).tolist(),
            },
        )
    figure = finish(figure, "tokens of context", metric_title(metric))
    lengths = sorted({int(each) for each in rows["length"]})
    figure.update_xaxes(type="log", tickvals=lengths, ticktext=[f"{each:,}" for each in lengths])
    if metric.endswith("_bytes"):
        byte_axis(figure, rows["value"], axis="y")
    else:
        figure.update_yaxes(type="log", exponentformat="SI")
    figure.update_layout(showlegend=rows["label"].nunique() > 1)
    return by_family(figure, look)
