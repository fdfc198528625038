"""GD++ and Newton's iteration by linear attention that reads both ways, on each prefix of the prompts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import InputError
from contextlab.constructions import GradientDescentPlusPlusConstruction, NewtonConstruction
from contextlab.learners import GradientDescent, GradientDescentPlusPlus, Newton
from contextlab.models.answer import answer
from contextlab.tasks import build_task
from tests.constructions.agreement import apart, distance, prompts

sizes = {"d": st.integers(1, 4), "examples": st.integers(1, 7), "seed": st.integers(0, 99)}


@settings(max_examples=5, deadline=None)
@given(**sizes, steps=st.integers(1, 4), curvature=st.sampled_from([0.0, 0.03, 0.08]))
def test_gd_plus_plus(d, examples, seed, steps, curvature):
    made = GradientDescentPlusPlusConstruction(d, steps, 0.05, curvature)
    exact, rounded = distance(made, build_task("linear_regression", dimensions=d, examples=examples), seed)
    assert exact < 1e-9
    assert rounded < 1e-6


@settings(max_examples=5, deadline=None)
@given(**sizes, steps=st.integers(0, 6), start=st.sampled_from([0.002, 0.001]))
def test_newton(d, examples, seed, steps, start):
    exact, rounded = distance(
        NewtonConstruction(d, steps, start), build_task("linear_regression", dimensions=d, examples=examples), seed
    )
    assert exact < 1e-8
    assert rounded < 1e-6


def test_the_learner_of_gd_plus_plus_is_as_the_paper_writes_it():
    """y <- y - dW x and x <- (I - gamma X X^T / n) x of all tokens, the query among them (2212.07677)."""
    prompt = prompts(build_task("linear_regression", dimensions=3, examples=6))
    said = GradientDescentPlusPlus(3, 0.1, 0.04)(prompt)
    for i in range(1, 6):
        x, y, query, guess = prompt.xs[0, :i].T, prompt.ys[0, :i, 0], prompt.xs[0, i], 0.0
        for _ in range(3):
            change = 0.1 * (y @ x.T) / i
            y, guess = y - change @ x, guess + change @ query
            covariance = x @ x.T / i
            x, query = x - 0.04 * covariance @ x, query - 0.04 * covariance @ query
        assert abs(said[0, i, 0] - guess) < 1e-12


def test_without_curvature_it_is_gradient_descent():
    prompt = prompts(build_task("linear_regression", dimensions=3, examples=6))
    assert apart(GradientDescentPlusPlus(4, 0.1, 0.0)(prompt), GradientDescent(4, 0.1)(prompt)) < 1e-12


def test_newtons_start_is_that_of_the_mean():
    prompt = prompts(build_task("linear_regression", dimensions=3, examples=6))
    said = Newton(4, start=0.003)(prompt)
    for i in range(1, 6):
        x, y = prompt.xs[0, :i], prompt.ys[0, :i, 0]
        s = x.T @ x / i
        m = 0.003 * s
        for _ in range(4):
            m = 2 * m - m @ s @ m
        assert abs(said[0, i, 0] - prompt.xs[0, i] @ m @ (x.T @ y) / i) < 1e-10


def test_enough_steps_of_newton_are_least_squares():
    task = build_task("linear_regression", dimensions=3, examples=12)
    prompt = prompts(task)
    said = NewtonConstruction(3, 24, 0.01).build(torch.float64)(prompt.inputs)
    assert apart(said, task.learners()["ols"](prompt)[:, -1]) < 1e-6


@pytest.mark.parametrize("made", [GradientDescentPlusPlusConstruction(), NewtonConstruction()])
def test_a_task_that_scores_every_example_is_refused_in_one_line(made):
    with pytest.raises(InputError, match="answers once a prompt, .* query to 'random'") as caught:
        made.spec().for_task(build_task("linear_regression"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("made", [GradientDescentPlusPlusConstruction(3, 3), NewtonConstruction(3, 4, 0.002)])
def test_each_prompt_is_read_up_to_the_example_that_is_scored(made):
    task = build_task("linear_regression", dimensions=3, examples=9, query="random")
    prompt = prompts(task, batch=16)
    model = made.build(torch.float64)
    assert model.spec == made.spec().for_task(task).made
    assert len(set(prompt.shot[prompt.scored].tolist())) > 3
    assert apart(answer(model, prompt)[prompt.scored], made.learner()(prompt)[prompt.scored]) < 1e-9


def test_more_steps_than_weights_can_say_are_refused():
    with pytest.raises(InputError, match="steps 61: .* use at most 60"):
        NewtonConstruction(steps=61)
