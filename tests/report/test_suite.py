"""The table of tasks by models."""

from __future__ import annotations

import pandas as pd

from contextlab.evaluation.results import table
from contextlab.report.figures import styles
from contextlab.report.suite import suite_figure, suite_table


def rows(task: str, metric: str, values: dict[str, float]) -> list[dict[str, object]]:
    """One row a model, and the best learner's last."""
    return [
        {
            "run": "r", "model": name, "kind": "learner" if name == "best" else "model", "seed": seed, "task": task,
            "split": "train", "metric": metric, "value": value + (seed - 0.5) * 0.02 * (name != "best"),
            "ci_low": value - 0.05 * (name == "best"), "ci_high": value + 0.05 * (name == "best"), "n": 10,
        }
        for name, value in values.items()
        for seed in ((0,) if name == "best" else (0, 1))
    ]  # fmt: skip


def results(metrics: tuple[str, ...]) -> pd.DataFrame:
    found = []
    for i, metric in enumerate(metrics):
        values = {"a": 0.2 + 0.1 * i, "b": 0.4, "best": 0.1}
        if i == 1:
            del values["b"]
        found += rows(f"task{i}", metric, values)
    return table(found)


def test_accuracies_have_a_mean_over_the_tasks() -> None:
    shown, best = suite_table(results(("accuracy", "accuracy", "accuracy"))), "10.0% ± 5.0% best"
    assert shown == [
        {"task (accuracy)": "task0", "a": "20.0% ± 12.7%", "b": "40.0% ± 12.7%", "reference learner": best},
        {"task (accuracy)": "task1", "a": "30.0% ± 12.7%", "b": "", "reference learner": best},
        {"task (accuracy)": "task2", "a": "40.0% ± 12.7%", "b": "40.0% ± 12.7%", "reference learner": best},
        {"task (accuracy)": "mean", "a": "30.0% ± 7.3%", "b": "", "reference learner": ""},  # b is missing on a task
    ]


def test_each_task_is_told_in_its_main_metric_over_whole_prompts() -> None:
    measured = results(("accuracy", "accuracy", "accuracy"))
    other = measured.assign(metric="cross_entropy", value=3.0)
    at_some = measured.assign(shot=2, value=0.05)
    assert suite_table(pd.concat([measured, other, at_some])) == suite_table(measured)


def test_errors_are_drawn_as_multiples_of_the_best() -> None:
    measured = results(("squared_error",) * 3)
    assert [row["task (squared error)"] for row in suite_table(measured)] == ["task0", "task1", "task2"]
    figure = suite_figure(measured, styles(measured))
    assert figure is not None
    assert [round(x, 6) for x in figure.data[0].x] == [2.0, 3.0, 4.0]


def test_mixed_metrics_are_named_and_not_drawn() -> None:
    measured = results(("squared_error", "squared_error", "accuracy"))
    assert [row["metric"] for row in suite_table(measured)] == ["squared error", "squared error", "accuracy"]
    assert suite_figure(measured, styles(measured)) is None


def test_two_tasks_need_no_such_table() -> None:
    measured = results(("accuracy", "accuracy"))
    assert suite_table(measured) == []
    assert suite_figure(measured, {}) is None
