"""The registry of report figures: the report's own, and those that plugins add."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pytest

from contextlab import InputError, register, registry
from contextlab.evaluation import Measured
from contextlab.kinds import PAGES
from contextlab.report import build_report, write_compress_page, write_cost_figure
from contextlab.report.sections import Drawn, TaskData, drawn_figures
from tests.evaluation.test_results import rows as cost_rows
from tests.report.conftest import LEARNERS, MODELS, make_results
from tests.report.test_compress import results as compressed


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
    own = html.split("Width of the intervals<")[1].split("</figure>")[0]
    assert "logarithmic axis" not in own  # only a figure that says so has a switch


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
    own = {page: [e.name for e in registry.registered("figure") if e.page == page] for page in PAGES}
    assert own["task"][:10] == [
        *("examples", "excess", "regret", "facets", "lengths", "splits", "models_by_splits", "similarity", "state"),
        "loss",
    ]
    assert [own[page][0] for page in ("overview", "cost", "compress")] == [
        "models_by_tasks",
        "cost_by_length",
        "quality_against_bytes",
    ]


def test_curves_show_what_they_are_of(results):
    """Learners are shown beside the models, but for the figure of what models lose against the best of them."""
    made = {each.title: each for each in drawn_figures(TaskData("regression", Measured(results), []))}
    for title, names, metric, switch in (
        ("Squared error by the number of in-context examples", {*MODELS, *LEARNERS}, "squared_error", True),
        ("How far above the best known learner", {*MODELS}, "excess_squared_error", False),
    ):
        lines = {trace.name: trace for trace in made[title].figure.data if trace.name}
        assert lines.keys() == names
        assert made[title].switch is switch
        for name, line in lines.items():
            rows = results[(results["model"] == name) & (results["metric"] == metric) & (results["split"] == "train")]
            assert list(line.y) == pytest.approx(list(rows.loc[rows["shot"].notna(), "value"]))


def test_a_task_without_data_for_a_figure_leaves_it_out(results, records):
    few = results[(results["split"] == "train") & results["shot"].isna()]
    made = list(drawn_figures(TaskData("regression", Measured(pd.DataFrame(few)), [])))
    assert "Training loss" not in [each.title for each in made]
    assert not any("in-context examples" in each.title for each in made)


def written(page: str, path, records, run_record) -> str:
    """The HTML of a page, from small results."""
    if page == "cost":
        rows = cost_rows([1.0], metric="state_bytes", split="cost", length=64, seed=0)
        return write_cost_figure(rows, path).read_text()
    if page == "compress":
        return write_compress_page(compressed(), path).read_text()
    return build_report(make_results(), records, [run_record], [{"name": "demo"}], path).read_text()


OWN = {"cost": "bytes of state", "compress": "needle, 512 tokens"}


@pytest.mark.parametrize("page", ["overview", "cost", "compress"])
def test_a_plugin_adds_a_figure_to_any_page_and_a_failing_one_is_told(figures, page, tmp_path, records, run_record):
    @register("figure", "rows", page=page)
    def rows(data):
        """How many rows were measured."""
        return go.Figure().add_bar(x=["rows"], y=[len(data.results)])

    @register("figure", "broken", page=page)
    def broken(data):
        return 1 / 0

    with pytest.warns(UserWarning, match="could not be drawn"):
        html = written(page, tmp_path / "page.html", records, run_record)
    assert html.count("<h3>How many rows were measured</h3>") == 1
    assert html.count("The figure &#39;broken&#39; could not be drawn: ZeroDivisionError: division by zero") == 1
    assert OWN.get(page, "") in html


@pytest.mark.parametrize(("page", "name"), [("cost", "cost_by_length"), ("compress", "quality_against_bytes")])
def test_a_plugin_replaces_a_figure(figures, page, name, tmp_path, records, run_record):
    before = written(page, tmp_path / "page.html", records, run_record)

    @register("figure", name, page=page, replace=True)
    def mine(data):
        """Another view."""
        return go.Figure()

    html = written(page, tmp_path / "page.html", records, run_record)
    assert "<h3>Another view</h3>" in html
    head = f"<h3>{OWN[page]}</h3>"  # the compress page has tables under the same heads
    assert html.count(head) == before.count(head) - 1


def test_a_replacement_that_was_registered_first_stays_in_its_place(figures):
    own = figures["excess"].factory
    figures.clear()

    @register("figure", "excess", replace=True)
    def mine(data):
        return None

    register("figure", "examples")(lambda data: None)
    register("figure", "excess")(own)
    assert [entry.name for entry in registry.registered("figure")] == ["examples", "excess"]
    assert registry.lookup("figure", "excess").factory is mine


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("figure", "x", {"page": "costs"}), "figure 'x': unknown page 'costs'; did you mean 'cost'?"),
        (
            ("figure", "exces", {"replace": True}),
            "to replace: unknown figure 'exces'; did you mean 'excess'?",
        ),
        (("policy", "x", {"replace": True}), "policy 'x': only figures take page and replace"),
    ],
)
def test_what_cannot_be_drawn_anywhere_is_refused_when_it_is_registered(figures, given, said):
    kind, name, options = given
    with pytest.raises(InputError) as caught:
        register(kind, name, **options)(lambda data: None)
    assert said in str(caught.value)
