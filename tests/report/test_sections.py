"""The registry of report figures: the report's own, and those that plugins add."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pytest

from contextlab import register, registry
from contextlab.evaluation import Measured
from contextlab.report import build_report
from contextlab.report.sections import Drawn, TaskData, drawn_figures


@pytest.fixture
def figures(monkeypatch):
    """The registered figures; what a test adds is forgotten afterwards."""
    known = dict(registry._entries["figure"])
    monkeypatch.setitem(registry._entries, "figure", known)
    return known


@pytest.fixture
def page(results, records, run_record, tmp_path):
    def build() -> str:
        path = tmp_path / "report.html"
        return build_report(results, records, [run_record], [{"name": "demo"}], path).read_text()

    return build


def test_a_plugins_figure_is_drawn_for_each_task(figures, page, results):
    @register("figure", "interval_widths")
    def widths(data):
        """Width of the intervals.

        A caption
        of two lines.
        """
        rows = data.rows[data.rows["metric"] == data.metric]
        return go.Figure().add_box(x=rows["model"], y=rows["ci_high"] - rows["ci_low"])

    html = page()
    assert html.count("Width of the intervals<") == results.loc[results["split"] == "train", "task"].nunique()
    assert "A caption of two lines." in html


def test_a_figure_that_fails_costs_the_report_nothing(figures, page):
    @register("figure", "broken")
    def broken(data):
        return 1 / 0

    @register("figure", "wrong")
    def wrong(data):
        return ["text"]

    with pytest.warns(UserWarning, match="could not be drawn"):
        html = page()
    assert "The figure &#39;broken&#39; could not be drawn: ZeroDivisionError: division by zero" in html
    assert "The figure &#39;wrong&#39; could not be drawn: TypeError: expected a Plotly figure" in html
    assert "Training loss" in html


def test_the_reports_own_figures_are_registered_and_keep_their_order(results, records):
    made = list(drawn_figures(TaskData("regression", Measured(results), records)))
    assert all(isinstance(each, Drawn) for each in made)
    titles = [each.title for each in made]
    assert titles[0] == "Squared error by the number of in-context examples"
    assert titles[-1] == "Training loss"
    own = [entry.name for entry in registry.registered("figure")][:10]
    assert own == [
        *("examples", "excess", "regret", "facets", "lengths", "splits", "models_by_splits", "similarity", "state"),
        "loss",
    ]


def test_a_task_without_data_for_a_figure_leaves_it_out(results, records):
    few = results[(results["split"] == "train") & results["shot"].isna()]
    made = list(drawn_figures(TaskData("regression", Measured(pd.DataFrame(few)), [])))
    assert "Training loss" not in [each.title for each in made]
    assert not any("in-context examples" in each.title for each in made)
