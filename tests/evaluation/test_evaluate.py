"""`evaluate`: the table holds what a plain loop over prompts finds, and every predictor gets the same prompts."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab.errors import InputError
from contextlab.evaluation import COLUMNS, EvaluateSpec, evaluate, evaluate_learners, mean_over_shots, predict
from contextlab.evaluation.evaluate import _prompts
from contextlab.learners import build_learner
from contextlab.models import build_model, preset
from contextlab.prompt import Learner
from contextlab.tasks import build_task

REGRESSION = build_task("linear_regression", dimensions=3, examples=6, noise=0.5)
RECALL = build_task("associative_recall", vocabulary=16, pairs=3, length=16)


class Zero(Learner):
    def __call__(self, prompt):
        return torch.zeros_like(prompt.targets)


def test_values_and_intervals_are_those_of_a_plain_loop():
    results = evaluate(Zero(), REGRESSION, prompts=50, batch=20, splits=("train",), seed=3)
    spec = EvaluateSpec(prompts=50, batch=20)
    ridge, errors, excess = REGRESSION.learners()["ridge"], [], []
    for prompt in _prompts(REGRESSION, spec, 0, "cpu"):
        own = prompt.targets.square().squeeze(-1)
        errors.append(own)
        excess.append(own - (ridge(prompt) - prompt.targets).square().squeeze(-1))
    for metric, values in (("squared_error", torch.cat(errors)), ("excess_squared_error", torch.cat(excess))):
        rows = results[results["metric"] == metric]
        for shot in range(6):
            row = rows[rows["shot"] == shot].iloc[0]
            mean, half = values[:, shot].mean().item(), 2.009575 * values[:, shot].std().item() / math.sqrt(50)
            assert row["value"] == pytest.approx(mean, rel=1e-5)
            assert row["ci_high"] - row["value"] == pytest.approx(half, rel=1e-3)
            assert row["n"] == 50
        overall = rows[rows["shot"].isna()].iloc[0]
        assert overall["value"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert overall["value"] - overall["ci_low"] == pytest.approx(
            2.009575 * values.mean(1).std().item() / math.sqrt(50), rel=1e-3
        )


def test_prompts_do_not_depend_on_the_predictor_or_the_batch_it_is_given():
    one = evaluate(build_learner("ridge", strength=0.25), REGRESSION, prompts=40, batch=40, name="ridge")
    all_of_them = evaluate_learners(REGRESSION, prompts=40, batch=40)
    theirs = all_of_them[(all_of_them["model"] == "ridge") & (all_of_them["split"] == "train")]
    ours = one[one["split"] == "train"]
    assert ours["value"].tolist() == theirs["value"].tolist()
    assert (theirs[theirs["metric"] == "excess_squared_error"]["value"] == 0).all()


def test_a_split_that_is_the_task_itself_is_no_shift():
    task = build_task("associative_recall", vocabulary=16, pairs=2, length=16)
    assert list(task.splits()) == ["train", "pairs=1", "pairs=2", "pairs=4", "length=32"]
    assert list(evaluate_learners(task, prompts=4)["split"].unique()) == ["train", "pairs=1", "pairs=4", "length=32"]
    asked = evaluate_learners(task, prompts=4, splits=("pairs=2",))
    assert list(asked["split"].unique()) == ["pairs=2"]


def test_more_accuracy_is_less_excess():
    results = evaluate_learners(RECALL, prompts=8)
    assert (results[results["metric"] == "accuracy"]["value"] == 1).all()
    model = build_model(preset("transformer", width=8, depth=1, heads=1).for_task(RECALL))
    rows = evaluate(model, RECALL, prompts=8, splits=("train",))
    whole = rows[rows["shot"].isna()].set_index("metric")["value"]
    assert whole["excess_accuracy"] == pytest.approx(1 - whole["accuracy"])


def test_the_table_is_tidy_and_the_model_is_left_as_it_was():
    model = build_model(preset("transformer", width=8, depth=1, heads=1).for_task(REGRESSION)).train()
    results = evaluate(model, REGRESSION, prompts=4, name="m", run="r", seed=7, task_name="t")
    assert tuple(results.columns) == COLUMNS
    assert model.training
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert set(results["split"]) == set(REGRESSION.splits())
    who = results[["run", "model", "kind", "seed", "task"]].drop_duplicates()
    assert who.to_dict("records") == [{"run": "r", "model": "m", "kind": "model", "seed": 7, "task": "t"}]
    assert not results.duplicated(["split", "metric", "shot"]).any()


def test_a_split_that_cannot_be_answered_is_a_missing_value_and_a_warning():
    spec = preset("transformer", width=8, depth=1, heads=1, position="learned", max_length=6).for_task(REGRESSION)
    with pytest.warns(UserWarning, match="cannot answer split 'more examples'.*does not fit max_length 6"):
        results = evaluate(build_model(spec), REGRESSION, prompts=4)
    row = results[results["split"] == "more examples"]
    assert len(row) == 1
    assert row["value"].isna().all()
    assert (row["n"] == 0).all()


def test_one_prompt_that_is_answered_with_nan_is_not_left_out_of_the_mean():
    def answer(inputs):
        given = torch.zeros(len(inputs), 6, 1)
        given[0] = math.nan
        return given

    results = evaluate(answer, REGRESSION, prompts=4, splits=("train",))
    assert results["value"].isna().all()
    assert set(results["n"]) == {4}


def test_nan_predictions_are_told_as_nan():
    results = evaluate(
        lambda inputs: torch.full((len(inputs), 6, 1), math.nan), REGRESSION, prompts=4, splits=("train",)
    )
    assert results["value"].isna().all()
    assert (results["n"] == 4).all()


def test_wrong_names_are_refused():
    with pytest.raises(InputError, match="did you mean 'train'"):
        evaluate(Zero(), REGRESSION, splits=("trian",))
    with pytest.raises(InputError, match="did you mean 'ridge'"):
        evaluate_learners(REGRESSION, learners=("rigde",))
    with pytest.raises(InputError, match="did you mean 'prompts'"):
        evaluate(Zero(), REGRESSION, promts=3)


def test_mean_over_shots():
    results = evaluate(Zero(), REGRESSION, prompts=30)
    train = results[(results["split"] == "train") & (results["metric"] == "squared_error")].set_index("shot")["value"]
    mean = mean_over_shots(results, "squared_error", 1, 5)
    assert mean["value"].iloc[0] == pytest.approx(train.loc[1:5].mean())


def test_predict_calls_models_with_inputs_and_learners_with_prompts():
    prompt = RECALL.sample(2, torch.Generator().manual_seed(0))
    assert torch.equal(predict(lambda inputs: inputs + 1, prompt), prompt.inputs + 1)
    assert torch.equal(predict(Zero(), prompt), torch.zeros_like(prompt.targets))


def test_batches_may_differ_in_their_largest_shot():
    task = build_task("mad_fuzzy_recall", preset="easy")
    table = evaluate(next(iter(task.learners().values())), task, prompts=48, batch=8, splits=("train",))
    assert table["value"].notna().all()
    assert table.loc[table["shot"].isna(), "n"].eq(48).all()
