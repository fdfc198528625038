"""Figures that are grids: models by shifts, and models by learners, with their values written in."""

from __future__ import annotations

from typing import Any

import pandas as pd
from plotly.colors import make_colorscale, sequential

from contextlab.errors import InputError, unknown
from contextlab.evaluation import summarise
from contextlab.evaluation.intervals import Interval
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.drawing import finish, rows_of
from contextlab.report.naming import ASIDE, interval_in_words, label
from contextlab.report.sketch import Sketch, drawing

GRID = ("model", "run", "kind", "split", "length")


@drawing
def heat_map(
    results: pd.DataFrame, task: str, rows: str, columns: str, metric: str, means: pd.DataFrame | None = None
) -> Sketch:
    """A metric, the mean over the prompt, on a grid of two columns of the results, with its values written in.

    rows, columns: such as "model" and "split" (a grid of shifts), or "model" and "length" (of lengths). Where several
        results fall into one cell it shows their mean; an empty cell has none.
    means: the results that are numbers with their seeds put together (see `summarise`), where these are known.
    """
    for name in (rows, columns):
        if name not in GRID:
            raise InputError(unknown("column for a heat map", name, GRID))
    if rows == columns:
        raise InputError(f"rows and columns are both {rows!r}; give two columns of the results")
    found = rows_of(results, task, metric, None, means=means)
    found = found[found["shot"].isna() & ~found["split"].isin(ASIDE)].assign(model=lambda each: each["label"])
    if found.empty:
        raise InputError(f"results hold no {metric!r} of task {task!r}; expected a metric that was evaluated")
    grid = found.pivot_table(index=rows, columns=columns, values="value", aggfunc="mean", sort=False)
    if columns == "length":
        grid = grid.sort_index(axis=1)
    if rows == "length":
        grid = grid.sort_index()
    # One scale for a metric, whatever the task: shares from 0 to 1, errors from 0 to the largest that is shown.
    share = metric in HIGHER_IS_BETTER
    most = 1.0 if share else float(results.loc[(results["metric"] == metric) & results["shot"].isna(), "value"].max())
    figure = _grid_figure(grid, "%{z:.1%}" if share else "%{z:.3g}", most)
    figure.update_traces(reversescale=not share, **_told_cells(found, grid, metric))
    return _finish_grid(figure, grid, columns, rows)


@drawing
def similarity_map(similarity: pd.DataFrame, task: str, measure: str = "errors", split: str = "train") -> Sketch:
    """How alike each model's predictions are to each learner's, with the values written in.

    similarity: a table of similarities (see `evaluation.measure`). measure: one of its measures.
    """
    chosen = similarity[
        (similarity["task"] == task) & (similarity["measure"] == measure) & (similarity["split"] == split)
    ]
    found = summarise(chosen)
    found = found.assign(model=label(found, similarity["run"].nunique() > 1))
    grid = found.pivot_table(index="model", columns="learner", values="value", aggfunc="mean", sort=False)
    grid = grid.T if grid.shape[1] > grid.shape[0] else grid  # names need less room beside a map than below it
    figure = _grid_figure(grid, "%{z:.2f}", 1.0)
    figure.update_traces(**_told_cells(found, grid, measure))
    return _finish_grid(figure, grid, "", "")


def _told_cells(found: pd.DataFrame, grid: pd.DataFrame, metric: str) -> dict[str, Any]:
    """What hovering over a grid's cell tells: the value with its interval; of several in a cell, their mean alone."""
    told: dict[tuple[Any, Any], list[str]] = {}
    for row in found.to_dict("records"):
        cell = interval_in_words(Interval.known(row["value"], row["ci_low"], row["ci_high"]), metric)
        told.setdefault((row[grid.index.name], row[grid.columns.name]), []).append(cell)
    cells = [[told.get((one, other), [""]) for other in grid.columns] for one in grid.index]
    words = [[each[0] if len(each) == 1 else "the mean of several" for each in row] for row in cells]
    return {"customdata": words, "hovertemplate": "%{y}, %{x}: %{customdata}<extra></extra>"}


def _grid_figure(grid: pd.DataFrame, shown: str, most: float) -> Sketch:
    """most: the value at the end of the scale of colours, which begins at 0."""
    return Sketch().add_heatmap(
        z=grid.to_numpy(dtype=float),
        x=[str(name) for name in grid.columns],
        y=[str(name) for name in grid.index],
        texttemplate=shown,
        zmin=0,
        zmax=most,
        colorscale=make_colorscale(sequential.Cividis),
        showscale=False,  # the values are written in
    )


def _finish_grid(figure: Sketch, grid: pd.DataFrame, x: str, y: str) -> Sketch:
    figure = finish(figure, x, y)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(height=160 + 36 * len(grid))
    return figure
