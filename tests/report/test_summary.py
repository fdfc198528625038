"""The words and the table say what the numbers say."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
import torch

from contextlab.evaluation import evaluate, evaluate_learners
from contextlab.evaluation.results import table
from contextlab.report import summary_table, summary_words
from contextlab.report.examples import example_table
from contextlab.report.lint import lint
from contextlab.tasks import build_task
from tests.report.conftest import make_records, make_results


def test_the_winner_is_named_with_its_margin(results, records):
    longer = results[results["split"] == "more examples"]  # a shift's numbers of examples are not those of training
    results = pd.concat([results, longer.assign(shot=longer["shot"] + 16).dropna(subset="shot")], ignore_index=True)
    words = summary_words(results, records)
    headline = next(w for w in words if "comes closest" in w)
    assert headline.startswith("regression: transformer comes closest to ridge")
    assert "0 to 15 in-context examples" in headline
    assert "is 0.051 ± 0.020 (+5.9%) above ridge's 0.875" in headline
    assert headline.endswith("(one seed: intervals are over prompts alone).")
    assert any("means of 3 seeds" in w for w in summary_words(make_results(3), records))


def test_table_and_words_tell_the_same_excess_over_the_same_positions():
    """Both are the mean over all that is scored, here worked out from the prompts themselves."""
    task = build_task("linear_regression", dimensions=3, examples=6)
    seen = {}

    def watch(name, split, task, prompt, prediction, errors):
        seen[name] = errors["squared_error"].double()[prompt.scored].mean().item()

    how = {"prompts": 32, "batch": 32, "splits": ["train"], "task_name": "r", "watch": watch}
    learner = evaluate_learners(task, **how)
    model = evaluate(lambda x: torch.zeros(*x.shape[:2], 1), task, **how)
    found = pd.concat([model, learner], ignore_index=True)
    (row, best), headline = summary_table(found, [])["r"], summary_words(found, [])[0]
    own, least = seen["model"], seen[next(iter(task.learners()))]
    told = re.search(
        r"squared error of model is (\S+) ± (\S+) \S+ above that of ridge, the .* learner, (\S+) ", headline
    )
    assert told is not None
    assert float(told[1]) == pytest.approx(own - least, abs=float(told[2]) / 10)
    assert float(told[3]) == pytest.approx(least, rel=6e-3)
    cells = [float(cell.split()[0]) for cell in (row["excess"], row["squared error"], best["squared error"])]
    assert cells[0] == pytest.approx(own - least, abs=float(told[2]) / 10)
    assert cells[1] - cells[2] == pytest.approx(own - least, abs=0.1)


def test_a_shift_of_one_model_is_told_without_a_best_of_one():
    one = make_results(models=("transformer",))
    told = next(w for w in summary_words(one, []) if "costs the model most" in w)
    assert "least excess" not in told
    single = one[one["split"].isin(["train", "scaled inputs", "cost"])]
    assert any("the shift 'scaled inputs' costs the model (" in w for w in summary_words(single, []))


def test_a_learner_without_any_error_is_no_divisor(results, records):
    learner = results["kind"].eq("learner") & results["metric"].eq("squared_error")
    perfect = results.assign(value=results["value"].mask(learner, 0.0))
    words = summary_words(perfect, records)
    told = [each for each in words if "comes closest to" in each or each.startswith("regression: above")]
    assert len(told) == 2
    assert not any("%" in each for each in told)


def test_recall_says_who_passes_and_what_is_known_of_the_rest(results, records):
    words = summary_words(results, records)
    assert any(w.startswith("recall: 1 of 4 models reaches 98% accuracy") for w in words)
    short = next(w for w in words if "mambaformer falls short" in w)
    assert "8 pairs" in short
    assert "by 17% over the last fifth" in short or "still falling" in short
    flat = make_records()
    for record in flat:
        record["history"]["loss"] = [1.0] * 50
    assert any("had levelled off" in w for w in summary_words(results, flat))
    for record in flat:
        del record["history"]
    told = next(w for w in summary_words(results, flat) if "mambaformer falls short" in w)
    assert "levelled" not in told
    assert "falling" not in told


def test_one_pair_is_no_pairs(results, records):
    few = results.replace({"split": {"pairs=8": "pairs=1"}})
    words = summary_words(few, records)
    short = next(w for w in words if "mambaformer falls short" in w)
    assert lint(words, few) == []
    assert re.search(r"[ :]1 pair \d", short)


def test_shifts_and_states_are_told(results, records):
    words = summary_words(results, records)
    worst = next(w for w in words if "'orthogonal query' costs the models most" in w)
    assert "; there transformer has the least excess, " in worst
    assert any(
        "transformer holds the least state, 4 KiB; mambaformer holds the most, 32 KiB (8 times" in w for w in words
    )


def test_failures_are_told(results, records):
    records[0] |= {"status": "diverged", "message": "the loss was not finite at step 7"}
    assert "transformer on regression diverged: the loss was not finite at step 7" in summary_words(results, records)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_is_sorted_and_ends_with_the_best_learner(seeds, records):
    tables = summary_table(make_results(seeds), records)
    assert list(tables) == ["regression", "recall"]
    assert tables["regression"][0]["model"] == "transformer"
    assert tables["regression"][-1]["model"] == "ridge (best learner)"
    assert tables["recall"][0]["accuracy"] == "100.0% (≥ 99.6%)"
    assert tables["recall"][0]["state"] == "4 KiB"
    assert len({tuple(row) for row in tables["recall"]}) == 1


def test_a_model_is_not_told_by_the_training_of_one_whose_name_holds_its_own():
    models = ("attention", "delta", "mamba2", "mamba")
    records = make_records(models)
    for record in records:
        if record["model"] == "mamba2":
            record["history"]["loss"] = [1.0] * 50
    words = summary_words(make_results(models=models), records)
    flat, falling = (next(w for w in words if f"recall: {name} falls short" in w) for name in ("mamba2", "mamba"))
    assert "had levelled off" in flat
    assert "still falling" in falling


def test_many_models_that_fall_short_are_told_in_groups():
    models = ("attention", *(f"m{i}" for i in range(12)))
    records = make_records(models)
    for record in records:
        if record["model"] in ("m3", "m7"):
            record["history"]["loss"] = [1.0] * 50
        if record["model"] == "m5":
            del record["history"]
    words = [w for w in summary_words(make_results(models=models), records) if w.startswith("recall:")]
    assert len(words) <= 6
    assert any("1 of 13 models reaches" in w and "; next: m0 97.0% ± 0.4%, m1 " in w for w in words)
    assert any("9 of the 12 that fall short" in w and "still falling" in w for w in words)
    assert any("2 of the 12 that fall short: m3, m7, whose loss had levelled off" in w for w in words)
    assert any("1 of the 12 that fall short: m5, for which the measurements here" in w for w in words)


def excess_rows(metric: str, excess: dict[str, list[float]], floor: float, fall: float = 0.0):
    """floor: the best learner's own value with no example; it falls by `fall` with each."""
    who = {"run": "r", "seed": 0, "task": "t", "split": "train", "n": 9}
    rows = []
    for name, values in {**excess, "best": [0.0] * 6}.items():
        kind = "learner" if name == "best" else "model"
        for shot, value in enumerate(values):
            each = {**who, "model": name, "kind": kind, "shot": shot}
            own = floor - fall * shot
            rows.append({**each, "metric": metric, "value": own, "ci_low": own, "ci_high": own})
            rows.append(
                {**each, "metric": f"excess_{metric}", "value": value, "ci_low": value - 0.6, "ci_high": value + 0.3}
            )
    return table(rows)


def test_examples_are_counted_until_the_excess_stays_small() -> None:
    # the best learner's error with the most examples is 10: near is an excess of 2, 1 and 0.5
    rows = excess_rows("squared_error", {"m": [5, 4, 1.9, 0.9, 0.9, 0.4], "far": [5] * 6}, floor=60.0, fall=10.0)
    first, second = example_table(rows, "squared_error")
    assert first == {
        "predictor": "m",
        "within 2 (20%)": "2 [2, 3]",
        "within 1 (10%)": "3 [3, 5]",
        "within 0.5 (5%)": "5 [3, never]",
    }
    assert set(second.values()) == {"far", "never"}
    # without noise it makes no error with the most: then that with the fewest counts
    clean = excess_rows("squared_error", {"m": [5, 4, 1.9, 0.9, 0.9, 0.4]}, floor=10.0, fall=2.0)
    assert "within 2 (20%)" in example_table(clean, "squared_error")[0]
    shares = excess_rows("accuracy", {"m": [0.5, 0.3, 0.15, 0.08, 0.01, 0.01]}, floor=0.9)
    assert [cell.split()[0] for cell in list(example_table(shares, "accuracy")[0].values())[1:]] == ["2", "3", "4"]
    assert example_table(excess_rows("squared_error", {"far": [5] * 6}, floor=10.0), "squared_error") == []
    assert example_table(rows[rows["shot"] < 3], "squared_error") == []


def test_examples_and_regret_are_told() -> None:
    rows = excess_rows("squared_error", {"m": [5, 4, 1.9, 0.9, 0.9, 0.4], "far": [5] * 6}, floor=10.0)
    online = {"run": "r", "seed": 0, "task": "t", "split": "online", "metric": "regret", "length": 40, "n": 20}
    played = table(
        {**online, "model": name, "kind": kind, "value": value, "ci_low": value - 1, "ci_high": value + 1}
        for name, kind, value in (
            ("far", "model", 9),
            ("m", "model", 4),
            ("ucb", "learner", 3),
            ("greedy", "learner", 8),
        )
    )
    words = summary_words(pd.concat([rows, played], ignore_index=True), [])
    assert any("stays within 1 (10%) of best: m 3 [3, 5]; not within the prompt: far." in w for w in words)
    near = excess_rows("squared_error", {"m": [0.1] * 6, "n": [0.2] * 6}, floor=10.0).assign(ci_low=0.0, ci_high=0.3)
    assert example_table(near, "squared_error")
    assert not any("after which" in w for w in summary_words(near, [])), "near from the start: nothing is said"
    told = next(w for w in words if "regret" in w)
    assert (
        "in 40 steps played online (regret): m 4.0 ± 1.0, far 9.0 ± 1.0; of the learners ucb loses least, 3.0 ± 1.0."
        in told
    )


def test_where_the_best_learner_errs_nobody_is_asked_for_more() -> None:
    from contextlab.evaluation.results import table

    measured = table(
        {
            "run": "r", "model": name, "kind": kind, "seed": 0, "task": "coins", "split": "train", "metric": "accuracy",
            "value": value, "ci_low": value, "ci_high": value, "n": 10,
        }
        for name, kind, value in (("near", "model", 0.79), ("far", "model", 0.6), ("votes", "learner", 0.8))
    )  # fmt: skip
    level = [
        {"run": "r", "task": "coins", "model": name, "status": "finished", "history": {"loss": [1.0] * 50}}
        for name in ("near", "far")
    ]
    assert not any("falls short" in word for word in summary_words(measured, [])), "no reason is known: none is told"
    words = summary_words(measured, level)
    assert words[0].startswith(
        "coins: 1 of 2 models comes within 2 points of votes, the best known learner (80.0%), on"
    )
    assert [word.split(" falls")[0] for word in words if "falls short" in word] == ["coins: far"]


def test_a_model_whose_answer_is_no_number_is_told_of_and_not_compared():
    own = {"run": "r", "task": "t", "split": "train", "metric": "squared_error", "length": 4, "shot": None, "n": 16}
    values = [("model", "good", 0, 1.0), ("model", "lost", 0, math.nan), ("model", "half", 0, 2.0)]
    values += [("model", "good", 1, 1.1), ("model", "lost", 1, math.nan), ("model", "half", 1, math.nan)]
    values += [("learner", "ridge", None, 0.5)]
    results = table(
        [
            {**own, "kind": kind, "model": name, "seed": seed, "value": value, "ci_low": value, "ci_high": value + 0.1}
            for kind, name, seed, value in values
        ]
    )
    (rows,) = summary_table(results, []).values()
    assert [row["model"] for row in rows] == ["good", "half", "lost", "ridge (best learner)"]
    assert rows[2]["squared error"] == "no number"
    words = summary_words(results, [])
    assert "t: left out, as an answer was no number: lost and half (1 of 2 seeds)." in words
    assert lint(words, results) == []
