"""Layers are found to answer as the algorithm that was written into them, after as many steps."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from contextlab import build_model, build_task
from contextlab.errors import InputError
from contextlab.inspect import Subject
from contextlab.inspect.probe import records
from contextlab.inspect.probes.algorithm import (
    BEHIND,
    SIMILARITY,
    STEPS,
    Algorithm,
    _fewest,
    _tried,
    answers_of,
    errors_of,
    nearest,
)
from contextlab.learners import GradientDescent, LeastSquares, Newton, Ridge
from contextlab.models import preset

TASK = build_task("linear_regression", dimensions=4, examples=16, noise=0.2)


def measured(model, task=TASK, **options) -> tuple[pd.DataFrame, list[str]]:
    probe = Algorithm(**{"prompts": 48, "pool": 3, "fit": 400, "steps": 8, **options})
    found = probe.measure(Subject(model.double(), task))
    return found.set_index(["site", "what", "measure"]), probe.words(records(found))


def test_each_layer_of_a_written_descent_takes_its_step():
    model = build_model("gd_construction", dimensions=4, steps=4, learning_rate=0.3)
    found, words = measured(model, read_out="own", step_size=0.3)
    for layer in range(4):
        site = f"blocks.{layer}.output"
        steps = found.loc[(site, "gradient_descent", STEPS)]
        assert steps["value"] == steps["ci_low"] == steps["ci_high"] == layer + 1
        assert found.loc[(site, "gradient_descent", SIMILARITY), "value"] > 1 - 1e-6
        assert found.loc[(site, "gradient_descent", BEHIND), "value"] == 0
        assert found.loc[(site, "ridge", BEHIND), "ci_low"] > 0
        assert found.loc[(site, "gradient_descent", SIMILARITY), "control"] < 0.9  # both err by about all of y
    assert words[2].startswith("Layer 2 answers as gradient_descent with 3 [3, 3] steps")
    assert "cannot be told apart" not in " ".join(words)


def test_fitted_read_outs_of_a_written_descent_are_its_steps_times_a_factor():
    model = build_model("gd_construction", dimensions=4, steps=3, learning_rate=0.2)
    found, _ = measured(model, step_size=0.2, fit=2000)
    for layer in range(3):
        site = f"blocks.{layer}.output"
        assert found.loc[(site, "gradient_descent", STEPS), "value"] == layer + 1
        assert found.loc[(site, "gradient_descent", SIMILARITY), "value"] > 0.995
        assert found.loc[(site, "gradient_descent", BEHIND), "value"] < 1e-9


def test_fresh_weights_answer_as_no_learner():
    model = preset("transformer", width=16, depth=2, heads=2).for_task(TASK)
    _, words = measured(build_model(model), fit=200)
    assert all("none of the task's learners" in each for each in words)


@pytest.mark.parametrize("learner", [Ridge(0.04), Newton(3), GradientDescent(5)])
def test_a_learner_is_nearest_to_itself(learner):
    prompt = TASK.sample(100, torch.Generator().manual_seed(0))
    known = answers_of({"ridge": Ridge(0.04), "newton": Newton(), "gd": GradientDescent()}, TASK, prompt, 8)
    found = nearest(errors_of(TASK, prompt, [learner(prompt)]), known, 30)
    name = next(name for name, (_, each) in found.items() if each[BEHIND]["value"] == 0)
    assert name == {Ridge: "ridge", Newton: "newton", GradientDescent: "gd"}[type(learner)]
    assert found[name][0] == getattr(learner, "steps", None)


def test_learners_that_answer_alike_cannot_be_told_apart():
    prompt = TASK.sample(100, torch.Generator().manual_seed(0))
    known = answers_of({"one": Ridge(0.04), "two": Ridge(0.0401), "ols": LeastSquares()}, TASK, prompt, 8)
    noisy = Ridge(0.04)(prompt) + 0.05 * torch.randn(100, 16, 1, generator=torch.Generator().manual_seed(1))
    found = nearest(errors_of(TASK, prompt, [noisy]), known, 50)
    behind = {name: each[BEHIND] for name, (_, each) in found.items()}
    assert max(behind["one"]["ci_low"], behind["two"]["ci_low"]) <= 0
    assert behind["ols"]["ci_low"] > 0


def test_chosen_prompts_part_candidates_further():
    prompt = TASK.sample(400, torch.Generator().manual_seed(0))
    known = answers_of({"one": Ridge(0.04), "two": Ridge(0.5)}, TASK, prompt, 8)
    errors = errors_of(TASK, prompt, [Ridge(0.04)(prompt)])
    chosen, all_of_them = (nearest(errors, known, keep)["two"][1][BEHIND]["value"] for keep in (50, 400))
    assert chosen > 1.5 * all_of_them


def test_the_interval_of_steps_covers_them():
    inside = 0
    generator = torch.Generator().manual_seed(0)
    task = TASK.replace(examples=10)
    for _ in range(20):
        prompt = task.sample(60, generator)
        known = answers_of({"gd": GradientDescent(), "ols": LeastSquares()}, task, prompt, 8)
        said = GradientDescent(4)(prompt) + 0.5 * torch.randn(60, 10, 1, generator=generator)
        steps = nearest(errors_of(task, prompt, [said]), known, 60)["gd"][1][STEPS]
        assert steps["ci_low"] <= steps["value"] <= steps["ci_high"]
        inside += steps["ci_low"] <= 4 <= steps["ci_high"]
    assert inside >= 17


def test_steps_that_are_tried():
    assert _tried(3) == [1, 2, 3]
    assert _tried(16) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16]
    assert _fewest(torch.tensor([[0.5, 1.0], [1.0, 1.0], [1.0, 0.0]])) == [1, 0]


def test_tokens_are_answered_as_learners_of_them():
    task = build_task("markov_chain", vocabulary=3, length=24)
    model = build_model(preset("transformer", width=16, depth=2, heads=2).for_task(task))
    found, words = measured(model, task, prompts=16, fit=32)
    assert set(found.index.get_level_values("what")) == set(task.learners())
    assert len(words) == 2


def test_what_cannot_be_told_is_refused():
    recall = build_task("associative_recall", vocabulary=16, pairs=2, length=12)
    probe = Algorithm()
    for task, said in (
        (recall, "the task has one learner, lookup"),
        (build_task("linear_regression", dimensions=3, examples=8, query="random"), "one or two predictions"),
    ):
        assert said in probe.refusal(Subject(build_model(preset("transformer", width=8).for_task(task)), task))
    classes = build_task("logistic_regression", dimensions=3, examples=8)
    model = build_model(preset("transformer", width=8).for_task(classes))
    with pytest.raises(InputError, match="'fitted' is for real targets"):
        Algorithm(read_out="fitted").measure(Subject(model, classes))
