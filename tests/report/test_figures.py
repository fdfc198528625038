from __future__ import annotations

import pandas as pd
import pytest

from contextlab.errors import InputError
from contextlab.evaluation import Measured
from contextlab.evaluation.intervals import Interval
from contextlab.evaluation.results import FACET_COLUMNS, SIMILARITY_COLUMNS, table
from contextlab.report.figures import (
    by_facet,
    by_length,
    curve,
    heat_map,
    lengths,
    quality_against_state,
    similarity_map,
    styles,
)
from contextlab.report.naming import interval_in_words
from contextlab.report.sections import TaskData
from contextlab.report.summary import summary_table
from tests.report.drawn import draw

LOW = 360
"""Pixels of figures that stand below the main one, which has more."""


def test_many_models_look_different() -> None:
    names = [f"model{i}" for i in range(40)]
    rows = pd.DataFrame({"run": "r", "model": names, "kind": "model", "seed": 0, "task": "t"})
    looks = styles(rows)
    assert list(looks) == names
    assert len({(look["colour"], look["marker"]) for look in looks.values()}) == 40
    assert len({(look["colour"], look["dash"]) for look in looks.values()}) == 40


def grid_rows() -> pd.DataFrame:
    who = {"run": "r", "kind": "model", "task": "t", "metric": "accuracy", "n": 10}
    rows = [
        {**who, "model": model, "seed": seed, "split": f"length={length}", "length": length, "value": value + seed / 10}
        for model, values in {"b": (0.9, 0.5, 0.1), "a": (0.8, 0.7, 0.6)}.items()
        for length, value in zip((64, 8, 16), values, strict=True)
        for seed in (0, 1)
    ]
    by_shot = [{**row, "shot": 3, "value": 77.0} for row in rows]
    return table([*rows, *by_shot, {**who, "model": "b", "split": "cost", "value": 5.0, "seed": 0}])


def test_a_heat_map_holds_the_means_over_seeds_where_they_belong() -> None:
    (map_,) = heat_map(grid_rows(), "t", "model", "length", "accuracy").data
    assert list(map_.x) == ["8", "16", "64"]
    assert list(map_.y) == ["b", "a"]
    assert [[round(value, 9) for value in row] for row in map_.z] == [[0.55, 0.15, 0.95], [0.75, 0.65, 0.85]]
    assert not map_.reversescale
    (shifts,) = heat_map(grid_rows(), "t", "split", "model", "accuracy").data
    assert list(shifts.y) == ["length=64", "length=8", "length=16"]
    assert list(shifts.x) == ["b", "a"]
    assert all("%" in words and (" ± " in words or "(" in words) for row in shifts.customdata for words in row)
    lower = grid_rows().assign(metric="error").astype({"metric": "string"})
    assert heat_map(lower, "t", "model", "split", "error").data[0].reversescale


def test_a_heat_map_names_what_it_cannot_show() -> None:
    with pytest.raises(InputError, match="did you mean 'split'"):
        heat_map(grid_rows(), "t", "model", "splits", "accuracy")
    with pytest.raises(InputError, match="both 'model'"):
        heat_map(grid_rows(), "t", "model", "model", "accuracy")
    with pytest.raises(InputError, match="no 'errors' of task 't'"):
        heat_map(grid_rows(), "t", "model", "split", "errors")


def facet_rows() -> pd.DataFrame:
    who = {"run": "r", "seed": 0, "task": "t", "split": "train", "facet": "distance", "metric": "accuracy", "n": 9}
    spans = [(1, 1), (2, 3), (4, 9)]
    values = {("m", "model"): (0.9, 0.8, 0.2), ("lookup", "learner"): (1.0, 1.0, 1.0)}
    return table(
        (
            {**who, "model": model, "kind": kind, "low": low, "high": high, "value": value}
            | {"ci_low": value - 0.1, "ci_high": value + 0.05}
            for (model, kind), line in values.items()
            for (low, high), value in zip(spans[::-1], line[::-1], strict=True)
        ),
        FACET_COLUMNS,
    )


def test_facets_have_a_place_a_group_with_bands_of_models_and_learners() -> None:
    results = table(
        [{"run": "r", "model": name, "kind": kind} for name, kind in (("m", "model"), ("lookup", "learner"))]
    )
    figure = by_facet(results, facet_rows(), "t", "distance", "accuracy")
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == ["lookup", "m"]
    assert figure.layout.height == LOW
    assert list(lines["m"].x) == [0, 1, 2]
    assert list(lines["m"].y) == [0.9, 0.8, 0.2]
    assert list(figure.layout.xaxis.ticktext) == ["1", "2\u20133", "4\u20139"]
    bands = {trace.legendgroup: trace for trace in figure.data if not trace.name}
    assert set(bands) == {"m", "lookup"}
    assert bands["m"].y == pytest.approx((0.95, 0.85, 0.25, 0.1, 0.7, 0.8))
    assert bands["m"].mode == "lines"


def test_groups_of_another_device_take_the_places_that_they_fall_into() -> None:
    rows = facet_rows()
    learner = rows["kind"] == "learner"
    rows.loc[learner & (rows["low"] == 4), ["low", "high"]] = (5, 12)
    results = table(
        [{"run": "r", "model": name, "kind": kind} for name, kind in (("m", "model"), ("lookup", "learner"))]
    )
    lines = {trace.name: trace for trace in by_facet(results, rows, "t", "distance", "accuracy").data if trace.name}
    assert list(lines["lookup"].x) == [0, 1, 2]
    assert lines["lookup"].text[2] == "5\u201312"


@pytest.mark.parametrize("with_models", [True, False])
def test_a_learner_that_would_squeeze_the_models_is_drawn_on_demand(with_models: bool) -> None:
    who = {"run": "r", "seed": 0, "task": "t", "split": "train", "metric": "squared_error", "n": 4}
    kinds = {"ours": ("model", 1.0), "ridge": ("learner", 2.9), "zero": ("learner", 3.1)}
    rows = [
        {**who, "model": name, "kind": kind, "shot": shot, "value": value}
        for name, (kind, value) in kinds.items()
        for shot in (0, 1)
        if with_models or kind == "learner"
    ]
    drawn = {line.name: line.visible for line in curve(table(rows), "t", "squared_error").data}
    assert drawn["ridge"] != "legendonly"
    assert (drawn["zero"] == "legendonly") == with_models


def test_lengths_are_those_of_train_and_of_the_first_split_of_each_other_length() -> None:
    who = {"run": "r", "seed": 0, "task": "t", "metric": "accuracy", "model": "m", "kind": "model"}
    splits = [("same", 16, 0.3), ("train", 16, 0.9), ("longer", 64, 0.5), ("noisy longer", 64, 0.1), ("short", 4, 1.0)]
    rows = table(
        [{**who, "split": split, "length": length, "value": value, "n": 4} for split, length, value in splits]
        + [
            {**who, "split": "failed", "length": 256, "n": 0},
            {**who, "split": "online", "length": 99, "value": 1, "n": 2},
        ]
    )
    assert lengths(rows, "t") == {4: "short", 16: "train", 64: "longer"}
    figure = by_length(rows, "t", "accuracy")
    assert figure.layout.height == LOW
    (line,) = (trace for trace in figure.data if trace.name)
    assert list(line.x) == [4, 16, 64]
    assert list(line.y) == [1.0, 0.9, 0.5]


def test_online_play_has_a_curve_and_no_cell_among_the_shifts() -> None:
    who = {"run": "r", "seed": 0, "task": "t", "model": "m", "kind": "model", "n": 4, "metric": "regret"}
    rows = table({**who, "split": "online", "shot": shot, "value": 1.0} for shot in (None, 0, 1, 2))
    figure = curve(rows, "t", "regret", "online")
    assert list(figure.data[-1].x) == [0, 1, 2]
    assert figure.layout.xaxis.title.text == "steps played"
    with pytest.raises(InputError, match="no 'regret'"):
        heat_map(rows, "t", "model", "split", "regret")


def test_the_map_of_similarity_has_learners_as_rows_where_they_are_more() -> None:
    who = {"run": "r", "seed": 0, "task": "t", "split": "train", "n": 4}
    cells = [("errors", name, value / 4) for name, value in zip("abc", (3, 2, 1), strict=True)]
    cells += [("spd", name, 5.0) for name in "abc"]
    rows = table(
        ({**who, "model": "m", "learner": name, "measure": measure, "value": value} for measure, name, value in cells),
        SIMILARITY_COLUMNS,
    )
    (grid,) = similarity_map(rows, "t").data
    assert list(grid.y) == ["a", "b", "c"]
    assert [row[0] for row in grid.z] == [0.75, 0.5, 0.25]


def test_bars_are_the_intervals_of_the_tables() -> None:
    """Over prompts and seeds by the values of prompts, where the cruder ones of `summarise` are wider."""
    results, by_prompt, truth = draw(20, seed=3)
    task = next(name for name, each in truth.items() if each["seeds"] == 3 and each["metric"] == "accuracy")
    measured = Measured(results, by_prompt=by_prompt)
    data = TaskData(task, measured, [])
    (table_rows,) = (rows for name, rows in summary_table(results, [], by_prompt).items() if name == task)
    figure = quality_against_state(results, task, "accuracy", told=data.told)
    marks = [trace for trace in figure.data if trace.name in {row["model"] for row in table_rows}]
    assert len(marks) == len(truth[task]["means"])
    for mark in marks:
        cell = next(row["accuracy"] for row in table_rows if row["model"] == mark.name)
        value = mark.y[0]
        told = Interval(value, value - mark.error_y.arrayminus[0], value + mark.error_y.array[0])
        assert interval_in_words(told, "accuracy") == cell
    assert any("±" in row["accuracy"] for row in table_rows)
