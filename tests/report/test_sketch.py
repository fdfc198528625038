"""Figures as plain data are what Plotly makes of the same calls, and all of ours are such as Plotly takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest

from contextlab import registry
from contextlab.evaluation import Measured
from contextlab.evaluation.results import FACET_COLUMNS, SIMILARITY_COLUMNS, table
from contextlab.report import digest, drawing
from contextlab.report.page_data import PageData
from contextlab.report.sections import CompressData, CostData, Data, Drawn, OverviewData, TaskData, drawn_figures
from contextlab.report.sketch import Sketch, rounded, template
from tests.evaluation.test_results import rows as cost_rows
from tests.report.conftest import MODELS
from tests.report.test_advice import CASES
from tests.report.test_compress import results as compressed
from tests.report.test_sweep import swept


def test_its_methods_do_what_plotlys_do() -> None:
    column = pd.Series([0.25, 4.0, math.nan])
    drawn = []
    for figure in (Sketch(), go.Figure()):
        figure.add_scatter(x=[1, 2, None], y=column.tolist(), name="a", marker={"color": None, "size": 3}, text=None)
        figure.add_scatter(x=(1, 2), y=[np.float64(3.0), np.int64(4)], error_y={"type": "data", "array": [0.5, 1.0]})
        figure.add_heatmap(z=[[0.0, math.nan]], x=["a", "b"], customdata=[["one", "two"]])
        figure.update_traces(name="all", hoverlabel={"align": "left"}).update_traces(hoverlabel={"namelength": 3})
        figure.update_layout({"xaxis": {"type": "log", "range": [1, 2]}}, height=300, margin={"l": 1, "r": 2})
        figure.update_xaxes(title={"text": "x"}, range=[3, 4]).update_yaxes(title={"text": "y", "standoff": 8})
        figure.update_layout(margin={"r": 9}, legend={"orientation": "h"}, template="plotly_white")
        figure.add_hline(y=2.0, line={"dash": "dash", "color": "#444"}, annotation_text="best")
        figure.add_vline(x=3, line={"width": 1.5})
        figure.add_annotation(text="told", x=1, y=2, font={"size": 11}, showarrow=False)
        drawn.append(PageData())
        drawn[-1].hold([Drawn("title", figure)])
    own, plotlys = (data.figures for data in drawn)
    assert own == plotlys
    assert drawn[0].templates == drawn[1].templates
    assert own[0]["data"][0]["y"] == [0.25, 4, None]
    assert "text" not in own[0]["data"][0]
    assert own[0]["data"][0]["marker"] == {"size": 3}
    json.dumps(own, allow_nan=False)


def test_arrays_and_columns_are_written_as_lists_and_given_mappings_are_left_alone() -> None:
    line = {"color": "#444"}
    figure = Sketch().add_scatter(x=np.arange(2), y=pd.Series([1.5, 2.5]), line=line).update_traces(line={"width": 2})
    assert figure.data == [{"type": "scatter", "x": [0, 1], "y": [1.5, 2.5], "line": {"color": "#444", "width": 2}}]
    assert line == {"color": "#444"}


def test_what_plotly_does_not_know_is_refused_by_plotly() -> None:
    with pytest.raises(ValueError, match="colour"):
        Sketch().add_scatter(x=[1], y=[1], colour="red").plotly()
    with pytest.raises(FileNotFoundError, match="no_such"):
        template("no_such")


def test_a_template_is_plotlys() -> None:
    assert template("plotly_white") == plotly.io.templates["plotly_white"].to_plotly_json()


def test_numbers_are_rounded_and_what_is_none_is_null() -> None:
    assert rounded({"a": [1.23456789, math.inf, math.nan, 7, "x", True, None]}, 3) == {
        "a": [1.23, None, None, 7, "x", True, None]
    }


def every_page(results: pd.DataFrame) -> Iterator[Data]:
    """Data of which each of our figures draws something."""
    who = {"run": "demo", "seed": 0, "n": 8}
    told = {"value": 0.5, "ci_low": 0.4, "ci_high": math.nan}
    played = [
        {**who, **told, "model": name, "kind": "model", "task": "regression", "split": "online", "metric": "regret",
         "shot": shot}
        for name in MODELS for shot in (None, 0, 1)
    ]  # fmt: skip
    longer = [
        {**who, **told, "model": name, "kind": "model", "task": "recall", "split": f"length={length}",
         "metric": "accuracy", "length": length}
        for name in MODELS for length in (32, 64)
    ]  # fmt: skip
    facets = [
        {**who, **told, "model": "transformer", "kind": "model", "task": "recall", "split": "train",
         "facet": "distance", "low": low, "high": low + 1, "metric": "accuracy"}
        for low in (1, 3)
    ]  # fmt: skip
    alike = [
        {**who, **told, "model": "transformer", "task": "regression", "split": "train", "learner": learner,
         "measure": measure}
        for learner in ("ridge", "ols") for measure in ("errors", "behind")
    ]  # fmt: skip
    measured = Measured(
        pd.concat([results, table([*played, *longer])], ignore_index=True),
        table(facets, FACET_COLUMNS),
        table(alike, SIMILARITY_COLUMNS),
    )
    for task in ("regression", "recall"):
        yield TaskData(task, measured, swept())
    whole = results[results["shot"].isna()]
    for task in ("regression", "recall"):
        own = whole[whole["task"] == task]
        yield OverviewData(Measured(pd.concat([own.assign(task=name) for name in "abc"], ignore_index=True)), [])
    own = whole[(whole["model"] == "transformer") & (whole["task"] == "recall")]
    many = [entry.name for entry in registry.entries("mixer") if entry.factory.__module__.startswith("contextlab.")]
    yield TaskData("recall", Measured(pd.concat([own.assign(model=name) for name in many[:20]], ignore_index=True)), [])
    yield CostData(cost_rows([1.0], metric="state_bytes", split="cost", length=64, seed=0))
    yield CompressData(compressed())
    yield CompressData(CASES["tied"][0].results)


def test_every_figure_of_ours_is_what_plotly_makes_of_it(results) -> None:
    """Plotly takes each property, and writes the same JSON."""
    drawn_by = set()
    for page in every_page(results):
        own, plotlys = PageData(), PageData()
        for drawn in drawn_figures(page):
            assert isinstance(drawn, Drawn), drawn
            assert isinstance(drawn.made, Sketch)
            own.hold([drawn])
            plotlys.hold([replace(drawn, made=drawn.figure)])
            drawn_by.add(drawn.name)
        assert own.figures == plotlys.figures
        assert own.templates == plotlys.templates
    ours = [e for e in registry.registered("figure") if e.factory.__module__.startswith("contextlab.")]
    assert drawn_by == {entry.name for entry in ours}


def test_a_report_works_out_its_results_once(tmp_path, results, records, run_record, monkeypatch) -> None:
    """Tables, sentences and figures share the means, the findings and the numbers of examples."""
    called = []

    def counted(module, name):
        before = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: called.append(name) or before(*args, **more))

    for module, name in ((digest, "summarise"), (digest, "findings"), (digest, "example_table")):
        counted(module, name)
    counted(drawing, "summarise")
    from contextlab.report import build_report

    build_report(results, records, [run_record], [{"name": "demo"}], tmp_path / "report.html")
    assert sorted(called) == ["example_table", "example_table", "findings", "summarise"]  # two tasks
