"""Runs in one report are compared where they are comparable, and told apart where they are not."""

from __future__ import annotations

import pandas as pd
import pytest

from contextlab.evaluation import Measured
from contextlab.evaluation.results import BY_PROMPT_COLUMNS, table
from contextlab.report import summary_table, summary_words
from contextlab.report.merged import differing_trainings, told_apart
from tests.report.conftest import make_records, make_results


def spec(**options) -> dict:
    return {
        "tasks": {
            "regression": {"task": "linear_regression", "options": {"dimensions": 5, **options}},
            "recall": {"task": "associative_recall"},
        }
    }


def measured(run: str, prompts: str = "p") -> Measured:
    rows = [
        {"run": run, "model": "transformer", "kind": "model", "seed": 0, "task": task, "split": "train"}
        | {"metric": metric, "prompts": prompts + task, "chance": 0.0, "values": [0.5] * 4}
        for task, metric in (("regression", "squared_error"), ("recall", "accuracy"))
    ]
    return Measured(make_results(run=run), by_prompt=table(rows, BY_PROMPT_COLUMNS))


RECORDS = [make_records(), make_records()]


def test_the_same_tasks_stay_side_by_side() -> None:
    tables, records, words = told_apart(["a", "b"], [measured("a"), measured("b")], RECORDS, [spec(), spec()])
    assert words == []
    assert records == RECORDS
    for one, two in zip(tables, (measured("a"), measured("b")), strict=True):
        pd.testing.assert_frame_equal(one.results, two.results)


@pytest.mark.parametrize(
    ("other", "prompts", "why"),
    [(spec(dimensions=8), "p", "dimensions: 5 and 8"), (spec(noise=0.5), "p", "noise: the default and 0.5")],
)
def test_a_task_with_other_options_is_told_apart(other, prompts, why) -> None:
    tables, records, words = told_apart(["a", "b"], [measured("a"), measured("b", prompts)], RECORDS, [spec(), other])
    assert words == [f"regression is not the same in a and b ({why}): told apart, not compared."]
    whole = Measured.join(tables)
    assert list(whole.results["task"].unique()) == ["regression in a", "recall", "regression in b"]
    assert set(whole.by_prompt["task"]) == {"regression in a", "recall", "regression in b"}
    assert {record["task"] for record in records[1]} == {"regression in b", "recall"}
    assert {record["task"] for record in RECORDS[1]} == {"regression", "recall"}
    sentences = summary_words(whole.results, [])
    assert not any(" a: " in each and " b: " in each and each.startswith("regression") for each in sentences)


def test_a_task_on_other_prompts_is_told_apart() -> None:
    tables = [measured("a"), measured("b", "q")]
    _, _, words = told_apart(["a", "b"], tables, RECORDS, [spec(), spec()])
    assert [each.split(" is ")[0] for each in words] == ["regression", "recall"]
    assert all("(other prompts)" in each for each in words)


def test_steps_and_seeds_have_columns_where_they_differ() -> None:
    records = make_records()
    assert all(told == {} for told in differing_trainings(records, "regression").values())
    assert "steps" not in summary_table(make_results(), records)["regression"][0]
    records[0]["steps"] = 9000
    records.append({**records[1], "seed": 1})
    told = differing_trainings(records, "regression")
    assert told["transformer"] == {"steps": "9,000", "seeds": "1"}
    assert told["lightning"] == {"steps": "500", "seeds": "2"}
    rows = summary_table(make_results(), records)["regression"]
    assert [row["steps"] for row in rows] == ["9,000", "500", "500", "500", ""]
    assert len({tuple(row) for row in rows}) == 1
