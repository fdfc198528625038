"""The table of learners says what was measured."""

from __future__ import annotations

from contextlab import build_task
from contextlab.evaluation import evaluate_learners
from contextlab.report.learners import learner_table


def test_one_split_shows_the_mean_and_three_shots_best_learner_first() -> None:
    task = build_task("linear_regression", dimensions=3, examples=9, noise=0.5)
    results = evaluate_learners(task, prompts=64, splits=("train",), task_name="regression")
    tables = learner_table(results, {"regression": task})
    assert list(tables) == ["regression · squared error"]
    rows = tables["regression · squared error"]
    assert list(rows[0]) == ["learner", "mean", "after 2", "after 4", "after 8"]
    assert rows[0]["learner"] == "ridge"
    assert rows[-1] == {"learner": "(chance)", "mean": "3.25", "after 2": "", "after 4": "", "after 8": ""}
    ridge = results[(results["model"] == "ridge") & (results["metric"] == "squared_error")].set_index("shot")["value"]
    assert rows[0]["after 8"] == f"{ridge[8]:.4g}"
    means = [float(row["mean"]) for row in rows[:-1]]
    assert means == sorted(means)


def test_several_splits_are_columns() -> None:
    task = build_task("associative_recall", preset="easy")
    results = evaluate_learners(task, prompts=16, task_name="recall")
    rows = learner_table(results, {"recall": task})["recall · accuracy"]
    shifts = [name for name, shifted in task.splits().items() if shifted != task]
    assert list(rows[0]) == ["learner", "train", *shifts]
    assert rows[0]["train"] == "100.0%"
