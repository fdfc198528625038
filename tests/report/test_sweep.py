"""What a report tells of a sweep: what was chosen, the window, and the curve."""

from __future__ import annotations

import pytest

from contextlab.evaluation import Measured
from contextlab.report import build_report, by_swept_field, chosen_table
from contextlab.report.sections import TaskData
from contextlab.report.sweep_figure import profile
from tests.report.conftest import make_records, make_results

RATES, PATH = [1e-3, 1e-2, 1e-1], "train.learning_rate"
CURVES = {"transformer": [0.5, 0.9, 0.88], "lightning": [0.2, 0.1, None]}


def swept(seeds: int = 2):
    """Records of two swept models, and of others that are not."""
    found = []
    for record in make_records():
        if record["task"] != "recall" or record["model"] not in CURVES:
            found.append(record)
            continue
        values = CURVES[record["model"]]
        curve = [
            {"trial": i, "setting": {PATH: rate}, "statuses": ["finished" if value else "diverged"] * seeds,
             "value": value, "ci_low": value and value - 0.01, "ci_high": value and value + 0.01}
            for i, (rate, value) in enumerate(zip(RATES, values, strict=True))
        ]  # fmt: skip
        trial = max(range(3), key=lambda i: values[i] or 0)
        sweep = {
            "trials": 3,
            "metric": "accuracy",
            "higher_is_better": True,
            "curve": curve,
            "windows": {PATH: [1e-2, 1e-1]},
        }
        found += [
            {**record, "seed": seed, "trial": trial, "setting": {PATH: RATES[trial]}, "sweep": sweep}
            for seed in range(seeds)
        ]
    return found


def test_the_table_has_a_row_for_each_swept_model():
    rows = chosen_table(swept())
    assert [(row["model"], row["chosen"], row["trials"]) for row in rows] == [
        ("transformer", "0.01", "3"), ("lightning", "0.001 (the smallest tried)", "3"),
    ]  # fmt: skip
    assert rows[0]["window"] == "0.01 to 0.1"
    assert rows[0]["accuracy on validation"] == "90.0% ± 1.0%"
    assert chosen_table(make_records()) == []


def test_the_figure_has_each_models_curve_without_trials_that_did_not_finish():
    results = make_results()
    (drawn,) = by_swept_field(TaskData("recall", Measured(results), swept()))
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in drawn.figure.data if trace.name}
    assert lines == {"transformer": (RATES, CURVES["transformer"]), "lightning": (RATES[:2], [0.2, 0.1])}
    assert drawn.figure.layout.xaxis.type == "log"
    assert by_swept_field(TaskData("regression", Measured(results), swept())) == []


@pytest.mark.parametrize(("higher", "best"), [(True, [0.4, 0.9]), (False, [0.3, 0.8])])
def test_at_each_value_the_best_of_the_other_fields_counts(higher, best):
    scores = [(1, 0.3), (1, 0.4), (2, 0.9), (2, 0.8)]
    curve = [
        {"setting": {"options.depth": depth}, "statuses": ["finished"], "value": v, "ci_low": v, "ci_high": v}
        for depth, v in scores
    ]
    line = profile({"curve": curve, "higher_is_better": higher}, "options.depth")
    assert line["at"].tolist() == [1, 2]
    assert line["value"].tolist() == best


def test_the_page_tells_what_was_chosen(run_record, tmp_path):
    path = tmp_path / "report.html"
    text = build_report(make_results(), swept(), [run_record], [{"name": "demo"}], path).read_text()
    assert "Chosen by the sweep" in text
    assert "Accuracy by train.learning_rate" in text
    plain = build_report(make_results(), make_records(), [run_record], [{"name": "demo"}], path).read_text()
    assert "Chosen by the sweep" not in plain
