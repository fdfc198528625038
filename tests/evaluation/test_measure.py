"""`measure`: from the predictions that `evaluate` makes, what the functions that measure one thing find themselves."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import torch

from contextlab import ModelSpec, build_model, build_task
from contextlab.evaluation import EvaluateSpec, Measured, breakdown, evaluate, evaluate_learners, similarity
from contextlab.evaluation.decisions import regret
from contextlab.evaluation.measure import beside, measure, measure_learners
from contextlab.evaluation.results import FACET_COLUMNS, SIMILARITY_COLUMNS, summarise

RECALL = build_task("associative_recall", vocabulary=32, pairs=4, length=24, power=1.0)
REGRESSION = build_task("linear_regression", dimensions=3, examples=6, noise=0.5)
BANDIT = build_task("bandit", arms=3, horizon=8)


def model_for(task, **options):
    return build_model(ModelSpec(width=8, depth=1, heads=1, **options).for_task(task), seed=0)


def test_results_are_those_of_evaluate_with_one_pass_over_the_prompts() -> None:
    model, spec = model_for(REGRESSION), EvaluateSpec(prompts=40, batch=16)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = measure(model, REGRESSION, spec, name="m", run="r", seed=2, task_name="t")
    assert len(calls) == 3 * len(REGRESSION.splits())
    alone = evaluate(model, REGRESSION, spec, name="m", run="r", seed=2, task_name="t")
    pd.testing.assert_frame_equal(found.results, pd.DataFrame(alone))
    learners = measure_learners(REGRESSION, spec, run="r", task_name="t")
    theirs = evaluate_learners(REGRESSION, spec, run="r", task_name="t")
    pd.testing.assert_frame_equal(learners.results, pd.DataFrame(theirs))
    assert found.facets.empty  # its positions are the shots
    assert learners.similarity.empty


@pytest.mark.parametrize("task", [RECALL, REGRESSION, BANDIT], ids=["recall", "regression", "bandit"])
def test_every_mean_over_prompts_has_its_values_by_prompt(task) -> None:
    spec = EvaluateSpec(prompts=24, batch=16, rollouts=0)
    for found in (measure(model_for(task), task, spec, name="m"), measure_learners(task, spec)):
        keys = ["model", "split", "metric"]
        means = found.results[found.results["shot"].isna() & (found.results["split"] != "online")].set_index(keys)[
            "value"
        ]
        by_prompt = found.by_prompt[found.by_prompt["split"] != "online"].set_index(keys)["values"]
        assert set(means.index) == set(by_prompt.index)
        for key, values in by_prompt.items():
            assert values.mean() == pytest.approx(means[key], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("facet", ["distance", "position"])
def test_facets_are_those_of_breakdown(facet: str) -> None:
    spec = EvaluateSpec(prompts=48, batch=48, splits=("train",))
    model = model_for(RECALL)
    learner = RECALL.learners()["lookup"]
    for name, predictor, found in (
        ("m", model, measure(model, RECALL, spec, name="m")),
        ("lookup", learner, measure_learners(RECALL, spec)),
    ):
        rows = found.facets[(found.facets["facet"] == facet) & (found.facets["model"] == name)]
        assert tuple(rows.columns) == FACET_COLUMNS
        alone = breakdown({name: predictor}, RECALL, facet, prompts=48, batch=48)
        same = ["low", "high", "metric", "value", "ci_low", "ci_high", "n"]
        pd.testing.assert_frame_equal(rows[same].reset_index(drop=True), alone[same], check_dtype=False)
    assert set(found.facets["kind"]) == {"learner"}


def test_later_batches_keep_the_groups_of_the_first_and_count_all_predictions() -> None:
    task = build_task("arithmetic", preset="easy")
    for batch in (2, 64):
        found = measure_learners(task, EvaluateSpec(prompts=64, batch=batch, splits=("train",))).facets
        for _, rows in found[found["metric"] == "accuracy"].groupby("facet"):
            scored = sum(
                int(task.sample(min(batch, 64), generator).scored.sum())
                for generator in [torch.Generator().manual_seed(1_000_003 * 20_000)]
                for _ in range(64 // batch)
            )
            assert rows["n"].sum() == scored
            assert (rows["low"] <= rows["high"]).all()
            assert (rows["low"].iloc[1:].to_numpy() > rows["high"].iloc[:-1].to_numpy()).all()
        assert (found.loc[found["metric"] == "accuracy", "value"] == 1).all()


def test_similarity_is_that_of_the_function() -> None:
    model = model_for(REGRESSION)
    spec = EvaluateSpec(prompts=50, batch=30, similarity=30, splits=("train",))
    found = measure(model, REGRESSION, spec, name="m").similarity
    assert tuple(found.columns) == SIMILARITY_COLUMNS
    alone = similarity(model, REGRESSION, prompts=30, batch=30, splits=("train",), weights=False)
    alone = alone[alone["shot"].isna()].reset_index(drop=True)
    same = ["split", "learner", "measure", "value", "ci_low", "ci_high", "n"]
    pd.testing.assert_frame_equal(found[same], alone[same], check_dtype=False)
    assert set(found["learner"]) == set(REGRESSION.learners())
    across = EvaluateSpec(prompts=50, batch=20, similarity=30, splits=("train",))
    assert set(measure(model, REGRESSION, across, name="m").similarity["n"]) == {30}


def test_similarity_has_limits_and_can_be_left_out(monkeypatch) -> None:
    model = model_for(REGRESSION)
    assert measure(model, REGRESSION, EvaluateSpec(prompts=8, similarity=0, splits=("train",))).similarity.empty
    one = EvaluateSpec(prompts=8, splits=("train",), learners=("ridge",))
    assert measure(model, REGRESSION, one).similarity.empty
    two = EvaluateSpec(prompts=8, splits=("train",), learners=("ols", "ridge"))
    assert list(measure(model, REGRESSION, two).similarity["learner"].unique()) == ["ols", "ridge"]
    monkeypatch.setattr(sys.modules[measure.__module__], "MOST_TOKENS", 35)
    assert set(measure(model, REGRESSION, two).similarity["n"]) == {5}


def test_decisions_are_played_online_by_models_and_learners() -> None:
    model, spec = model_for(BANDIT), EvaluateSpec(prompts=8, splits=("train",), rollouts=20)
    found = measure(model, BANDIT, spec, name="m", run="r", seed=3, task_name="t")
    online = found.results[found.results["split"] == "online"].reset_index(drop=True)
    alone = regret({"m": model}, BANDIT, problems=20, run="r", task_name="t")
    pd.testing.assert_frame_equal(online.drop(columns="seed"), alone.drop(columns="seed"))
    assert set(online["seed"]) == {3}
    learners = measure_learners(BANDIT, spec, task_name="t").results
    played = learners[(learners["split"] == "online") & (learners["metric"] == "regret")]
    assert set(played["model"]) == set(BANDIT.learners())
    assert set(played["n"]) == {20}
    none = measure(model, BANDIT, EvaluateSpec(prompts=8, splits=("train",), rollouts=0)).results
    assert set(none["split"]) == {"train"}


def test_a_model_that_cannot_play_is_a_missing_value_and_a_warning() -> None:
    model = model_for(BANDIT, position="learned", max_length=5)
    spec = EvaluateSpec(prompts=8, splits=("train",))
    with (
        pytest.warns(UserWarning, match="m cannot play online: .*max_length 5"),
        pytest.warns(UserWarning, match="m cannot answer split 'train'"),
    ):
        found = measure(model, BANDIT, spec, name="m", seed=1).results
    row = found[found["split"] == "online"]
    assert row["value"].isna().all()
    assert row[["metric", "n", "kind", "seed"]].to_numpy().tolist() == [["regret", 0, "model", 1]]


def test_a_split_that_cannot_be_answered_has_no_facets() -> None:
    model = model_for(RECALL, position="learned", max_length=24)
    with pytest.warns(UserWarning, match="cannot answer split 'length=48'"):
        found = measure(model, RECALL, EvaluateSpec(prompts=8))
    answered = set(found.results.loc[found.results["n"] > 0, "split"])
    assert set(found.facets["split"]) == answered
    assert "length=48" not in answered


def test_tables_lie_beside_the_results_and_stale_ones_go(tmp_path) -> None:
    spec = EvaluateSpec(prompts=12, splits=("train",))
    recall, regression = (
        measure(model_for(task), task, spec, task_name=name) for task, name in ((RECALL, "a"), (REGRESSION, "b"))
    )
    one, two = tmp_path / "results.parquet", tmp_path / "b.parquet"
    recall.write(one)
    regression.write(two)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b.by_prompt.parquet", "b.parquet", "b.similarity.parquet", "by_prompt.parquet", "facets.parquet",
        "results.parquet",
    ]  # fmt: skip
    both = Measured.read([one, two])
    joined = Measured.join([recall, regression])
    for name in ("results", "facets", "similarity", "by_prompt"):
        pd.testing.assert_frame_equal(getattr(both, name), getattr(joined, name))
    regression.write(one)
    assert not beside(one, "facets").exists()
    assert Measured.read([one]).facets.empty


def test_seeds_of_facets_are_put_together() -> None:
    spec = EvaluateSpec(prompts=12, splits=("train",))
    parts = Measured.join([measure(model_for(RECALL), RECALL, spec, seed=seed) for seed in (0, 1)])
    whole = summarise(parts.facets)
    assert set(whole["seeds"]) == {2}
    assert len(whole) == len(parts.facets) / 2
    assert not whole.duplicated(["facet", "low", "metric"]).any()
