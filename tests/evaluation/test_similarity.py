"""Learners are found to be what they are: alike to themselves, to their limits, and at their own number of steps."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from contextlab import ModelSpec, build_model, build_task
from contextlab.errors import InputError
from contextlab.evaluation.similarity import COLUMNS, layer_read_outs, matching_steps, similarity
from contextlab.learners import GradientDescent, LeastSquares, Newton, Ridge
from contextlab.prompt import Learner

TASK = build_task("linear_regression", dimensions=3, examples=12, noise=0.5)


def value(found: pd.DataFrame, learner: str, measure: str, shot: int | None = None, split: str = "train") -> float:
    rows = found[(found["learner"] == learner) & (found["measure"] == measure) & (found["split"] == split)]
    rows = rows[rows["shot"].isna() if shot is None else rows["shot"] == shot]
    return float(rows["value"].item())


def test_every_learner_is_like_itself_on_every_split() -> None:
    for name in ("ridge", "gradient_descent", "knn"):
        found = similarity(TASK.learners()[name], TASK, ["ridge", "gradient_descent", "knn"], prompts=40)
        assert list(found.columns) == list(COLUMNS)
        assert set(found["split"]) == set(TASK.splits())
        own = found[found["learner"] == name]
        for measure, expected in (("errors", 1.0), ("spd", 0.0), ("weights", 1.0), ("ilwd", 0.0)):
            rows = own[own["measure"] == measure]
            assert len(rows) > 6
            np.testing.assert_allclose(rows["value"], expected, atol=1e-9)
        others = found[(found["learner"] != name) & found["shot"].isna() & (found["split"] == "train")]
        assert (others.loc[others["measure"] == "errors", "value"] < 0.99).all()
        assert (others.loc[others["measure"] == "spd", "value"] > 0.01).all()


def test_errors_and_differences_by_hand() -> None:
    learners = {"ols": LeastSquares(), "gd": GradientDescent(2)}
    found = similarity(Ridge(0.5), TASK, learners, prompts=30, batch=12, seed=4, splits=["train"], weights=False)
    generator = torch.Generator().manual_seed(1_000_003 * 4)
    drawn = [TASK.sample(size, generator) for size in (12, 12, 6)]
    answers = {
        name: np.concatenate([learner(prompt)[..., 0].double().numpy() for prompt in drawn])
        for name, learner in {"own": Ridge(0.5), **learners}.items()
    }
    wanted = np.concatenate([prompt.targets[..., 0].double().numpy() for prompt in drawn])
    for name in learners:
        e, f = answers["own"] - wanted, answers[name] - wanted
        for shot in (1, 5, 11):
            cosine = e[:, shot] @ f[:, shot] / np.linalg.norm(e[:, shot]) / np.linalg.norm(f[:, shot])
            assert value(found, name, "errors", shot) == pytest.approx(cosine, abs=1e-6)
            spd = ((answers["own"] - answers[name])[:, shot] ** 2).mean()
            assert value(found, name, "spd", shot) == pytest.approx(spd, rel=1e-6)
        each = (e * f)[:, 1:].sum(1) / np.linalg.norm(e[:, 1:], axis=1) / np.linalg.norm(f[:, 1:], axis=1)
        assert value(found, name, "errors") == pytest.approx(each.mean(), abs=1e-6)
        row = found[(found["learner"] == name) & (found["measure"] == "errors") & found["shot"].isna()].iloc[0]
        half = 1.96 * each.std(ddof=1) / math.sqrt(30)
        assert row["ci_low"] == pytest.approx(each.mean() - half, abs=1e-4)
        between = ((answers["ols"] - answers["gd"]) ** 2).mean()
        assert value(found, name, "separation") == pytest.approx(between, rel=1e-6)


def test_the_jackknife_interval_covers_as_often_as_it_says() -> None:
    inside = 0

    def measure(prompts: int, seed: int) -> pd.DataFrame:
        learners = {"gd": GradientDescent(5)}
        return similarity(Ridge(1.0), TASK, learners, weights=False, splits=["train"], prompts=prompts, seed=seed)

    truth = value(measure(6000, 1000), "gd", "errors", 5)
    for seed in range(40):
        found = measure(100, seed)
        row = found[(found["measure"] == "errors") & (found["shot"] == 5)].iloc[0]
        inside += bool(row["ci_low"] <= truth <= row["ci_high"])
    assert inside >= 34


def test_induced_weights_are_those_of_the_closed_form() -> None:
    found = similarity(Ridge(0.5), TASK, {"ols": LeastSquares()}, prompts=8, weight_prompts=8, splits=["train"])
    prompt = TASK.sample(8, torch.Generator().manual_seed(1_000_003 * 20_000))
    shots = found.loc[(found["measure"] == "ilwd") & found["shot"].notna(), "shot"].astype(int).tolist()
    assert shots[0] == 1
    assert shots[-1] == 11
    for shot in shots:
        x, y = prompt.xs[:, :shot].double(), prompt.ys[:, :shot].double()
        ols = torch.linalg.pinv(x, rtol=1e-9) @ y
        ridge = torch.linalg.solve(x.mT @ x + 0.5 * torch.eye(3).double(), x.mT @ y)
        expected = (ols - ridge).square().sum((1, 2)).mean().item()
        assert value(found, "ols", "ilwd", shot) == pytest.approx(expected, rel=2e-3)
        cosine = torch.cosine_similarity(ols, ridge, dim=1).mean().item()
        assert value(found, "ols", "weights", shot) == pytest.approx(cosine, abs=1e-4)


def test_the_answer_to_what_is_asked_is_hidden() -> None:
    """A learner that answers with the target that it is shown has no weights left when it is asked other queries."""

    class Peeks(Learner):
        def __call__(self, prompt):
            return prompt.ys

    found = similarity(Peeks(), TASK, {"ols": LeastSquares()}, prompts=8, weight_prompts=8, splits=["train"])
    weights = found[(found["measure"] == "weights") & found["shot"].notna()]["value"]
    assert len(weights)
    assert weights.abs().max() < 1e-9


def test_ridge_becomes_least_squares_with_many_examples() -> None:
    task = TASK.replace(examples=60)
    found = similarity(Ridge(0.25), task, ["ols"], prompts=100, splits=["train"])
    assert value(found, "ols", "errors", 59) > 0.999 > value(found, "ols", "errors", 2)
    assert value(found, "ols", "ilwd", 59) < 1e-3 < value(found, "ols", "ilwd", 1)
    assert value(found, "ols", "weights", 59) > 0.9999


@pytest.mark.parametrize("layout", ["paired", "interleaved"])
def test_models_are_called_with_the_inputs_at_every_prefix(layout: str) -> None:
    task = TASK.replace(layout=layout)

    def model(inputs: Tensor) -> Tensor:
        """Averaging, from the tokens alone."""
        if layout == "paired":
            x, px, py = inputs.split([3, 3, 1], -1)
            past = (px * py).cumsum(1)
        else:
            x = inputs[..., :3]
            past = (x[:, :-1] * inputs[:, 1:, 3:]).cumsum(1)
            past = torch.cat([torch.zeros_like(past[:, :1]), past], 1)
        return (x * past).sum(-1, keepdim=True)

    class Sum(Learner):
        def __call__(self, prompt):
            return model(prompt.inputs)

    found = similarity(model, task, {"sum": Sum(), "ridge": Ridge(1.0)}, prompts=20, splits=["train"])
    assert value(found, "sum", "errors") == pytest.approx(1)
    assert value(found, "sum", "weights") == pytest.approx(1)
    # The sum of y x is the averaging learner's weights times the examples: the same direction.
    averaging = similarity(model, task, ["averaging"], prompts=20, splits=["train"])
    assert value(averaging, "averaging", "weights") == pytest.approx(1)
    assert value(found, "ridge", "weights") < 0.99


def test_shifts_tell_apart_what_training_does_not() -> None:
    task = build_task("linear_regression", dimensions=3, examples=12)
    found = similarity(LeastSquares(), task, ["ols", "averaging"], prompts=50, weights=False)
    assert value(found, "ols", "separation") == value(found, "averaging", "separation")
    assert value(found, "averaging", "spd", split="scaled inputs") > 10 * value(found, "averaging", "spd")
    assert value(found, "ols", "errors", 11) == 1  # neither errs: rounding has no direction
    assert value(found, "averaging", "errors", 11) == 0  # only one does


@pytest.mark.parametrize(("learner", "steps"), [(GradientDescent(7), 7), (Newton(5), 5)])
def test_the_number_of_steps_is_found(learner: Learner, steps: int) -> None:
    name = {GradientDescent: "gradient_descent", Newton: "newton"}[type(learner)]
    found = matching_steps(learner, TASK, name, range(1, 13), prompts=60)
    best = found[found["best"]]
    assert best["shot"].isna().sum() == 1
    assert best["shot"].notna().sum() == 12
    assert best.loc[best["shot"].isna() | (best["shot"] >= 3), "steps"].eq(steps).all()
    assert found.groupby("shot", dropna=False)["best"].sum().eq(1).all()
    np.testing.assert_allclose(best["value"], 1.0, atol=1e-9)
    assert len(found) == 12 * 13


def test_ridge_is_nearer_to_many_newton_steps_than_to_few() -> None:
    found = matching_steps(Ridge(0.01), TASK, Newton(1), [1, 4, 16], prompts=60)
    assert found.loc[found["best"] & found["shot"].isna(), "steps"].item() == 16


@pytest.mark.parametrize("name", ["associative_recall", "boolean_function"])
def test_tokens_and_labels_are_compared_by_probability(name: str) -> None:
    task = build_task(name, preset="easy")
    learners = task.learners()
    best = next(iter(learners))
    found = similarity(learners[best], task, [best], prompts=20, splits=["train"])
    assert value(found, best, "errors") == pytest.approx(1)
    assert set(found["measure"]) == {"errors", "spd"}

    class Doubtful(Learner):
        def __call__(self, prompt):
            return 0 * learners[best](prompt)

    found = similarity(Doubtful(), task, [best], prompts=20, splits=["train"])
    assert 0 < value(found, best, "spd") <= 2
    assert value(found, best, "errors") < 0.99


def test_wrong_requests_are_named() -> None:
    with pytest.raises(InputError, match="did you mean 'ridge'"):
        similarity(Ridge(1.0), TASK, ["ridg"])
    with pytest.raises(InputError, match="did you mean 'scaled inputs'"):
        similarity(Ridge(1.0), TASK, ["ridge"], splits=["scaled input"])
    with pytest.raises(InputError, match="no number of steps"):
        matching_steps(Ridge(1.0), TASK, "ridge")
    with pytest.raises(InputError, match="at least one"):
        matching_steps(Ridge(1.0), TASK, "newton", [])


def test_a_split_that_cannot_be_answered_is_left_out_with_a_warning() -> None:
    class Short(Learner):
        def __call__(self, prompt):
            if prompt.length > 12:
                raise InputError("too long for me")
            return torch.zeros_like(prompt.targets)

    with pytest.warns(UserWarning, match="'more examples' is left out: too long for me"):
        found = similarity(Short(), TASK, ["ridge"], prompts=8, weights=False)
    assert "more examples" not in set(found["split"])
    assert "train" in set(found["split"])


def test_layers_are_read_out_by_least_squares() -> None:
    model = build_model(ModelSpec(width=16, depth=2, heads=2).for_task(TASK), seed=0).train()
    found = layer_read_outs(model, TASK, prompts=48, batch=20, seed=3, ridge=0.0)
    assert list(found) == ["layer 1", "layer 2", "output"]
    assert found["output"] is model
    assert model.training
    generator = torch.Generator().manual_seed(1_000_003 * 3)
    drawn = [TASK.sample(size, generator) for size in (20, 20, 8)]
    fresh = TASK.sample(5, torch.Generator().manual_seed(9))
    for index, block in enumerate(model.blocks):
        seen: list[Tensor] = []
        hook = block.register_forward_hook(lambda module, given, result, seen=seen: seen.append(result[0].detach()))
        for prompt in [*drawn, fresh]:
            model(prompt.inputs)
        hook.remove()
        features = [np.concatenate([x.double().numpy(), np.ones((*x.shape[:2], 1))], -1) for x in seen]
        flat = np.concatenate([each.reshape(-1, 17) for each in features[:-1]])
        wanted = np.concatenate([prompt.targets.double().numpy().reshape(-1, 1) for prompt in drawn])
        expected = features[-1] @ np.linalg.lstsq(flat, wanted, rcond=None)[0]
        np.testing.assert_allclose(found[f"layer {index + 1}"](fresh.inputs), expected, rtol=1e-5, atol=1e-6)
    steps = matching_steps(found["layer 1"], TASK, "newton", [1, 2], prompts=16)
    assert steps["best"].sum() == 13


def test_layers_of_labels_are_refused() -> None:
    task = build_task("boolean_function", preset="easy")
    model = build_model(ModelSpec(width=8, depth=1, heads=1).for_task(task), seed=0)
    with pytest.raises(InputError, match="real targets, such as those of linear_regression, not of BooleanFunction"):
        layer_read_outs(model, task, prompts=4)


def test_of_a_pool_the_prompts_on_which_the_candidates_differ_most_are_compared() -> None:
    learners = {"ridge": Ridge(0.4), "ols": LeastSquares(), "gd": GradientDescent(1)}
    how = {"splits": ["train"], "weights": False}
    plain, sharp = (similarity(Ridge(0.5), TASK, learners, prompts=20, pool=pool, **how) for pool in (1, 4))
    assert set(sharp.loc[sharp["shot"].isna(), "n"]) == {20}
    drawn = similarity(Ridge(0.5), TASK, learners, prompts=80, **how)
    for fewer in (plain, drawn):  # ridge and the one step of gradient descent are the candidates
        assert value(sharp, "gd", "separation") > 1.2 * value(fewer, "gd", "separation")
    assert value(sharp, "ridge", "behind") == 0
    behind = value(sharp, "ridge", "errors") - value(sharp, "gd", "errors")
    assert value(sharp, "gd", "behind") == pytest.approx(behind, abs=1e-9)
    row = sharp[(sharp["learner"] == "gd") & (sharp["measure"] == "behind")].iloc[0]
    assert row["ci_low"] > 0
    with pytest.raises(InputError, match="pool: expected at least 1 prompt"):
        similarity(Ridge(0.5), TASK, learners, prompts=20, pool=0)


def test_prompts_on_which_every_learner_is_perfect_tell_nothing() -> None:
    task = build_task("associative_recall", vocabulary=16, pairs=2, length=8)
    (lookup,) = list(task.learners().values())[:1]
    with pytest.warns(UserWarning, match="every learner is perfect on these prompts"):
        found = similarity(lookup, task, {"one": lookup, "two": lookup}, prompts=8, splits=["train"])
    assert found.empty
