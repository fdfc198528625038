"""Linear attention equals gradient descent, at every prefix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import InputError, build_model
from contextlab.constructions import GradientDescentConstruction, PreconditionedConstruction
from contextlab.tasks import build_task
from tests.constructions.agreement import apart, distance, prompts


@settings(max_examples=6, deadline=None)
@given(
    d=st.integers(1, 6), examples=st.integers(1, 12), steps=st.integers(1, 5), looped=st.booleans(),
    rate=st.floats(0.01, 0.3), noise=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_steps_of_gradient_descent(d, examples, steps, looped, rate, noise, seed):
    task = build_task("linear_regression", dimensions=d, examples=examples, noise=noise)
    made = GradientDescentConstruction(d, steps, rate, looped)
    exact, rounded = distance(made, task, seed)
    assert exact < 1e-10
    assert rounded < 1e-6
    assert len(made.build().blocks) == (1 if looped else steps)


@settings(max_examples=6, deadline=None)
@given(
    d=st.integers(1, 5), count=st.integers(1, 40), steps=st.integers(1, 3), noise=st.sampled_from([0.0, 0.7]),
    known=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_best_layer_for_a_covariance(d, count, steps, noise, known, seed):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = root @ root.T / d + 0.1 * torch.eye(d)
    covariance = tuple(tuple(row) for row in ((c + c.T) / 2).tolist()) if known else None
    made = PreconditionedConstruction(d, count, covariance, noise, steps)
    exact, rounded = distance(made, build_task("linear_regression", dimensions=d, examples=9), seed)
    assert exact < 1e-10
    assert rounded < 1e-6


def test_one_layer_is_as_the_papers_write_it():
    """2212.07677, Proposition 1: a change of -dW x of the query's target; 2306.09927, Theorem 4.1: Gamma^-1 between."""
    d, n, rate = 3, 7, 0.2
    prompt = prompts(build_task("linear_regression", dimensions=d, examples=n))
    variances = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    best = PreconditionedConstruction(d, 7, tuple(map(tuple, variances.diag().tolist())))
    gamma = (1 + 1 / 7) * variances.diag() + variances.sum() / 7 * torch.eye(d)
    for made, matrix in (
        (GradientDescentConstruction(d, 1, rate), rate * torch.eye(d, dtype=torch.float64)),
        (best, torch.linalg.inv(gamma)),
    ):
        said = made.build(torch.float64)(prompt.inputs)
        for b in range(prompt.batch):
            for i in range(1, n):
                x, y = prompt.xs[b, :i], prompt.ys[b, :i, 0]
                weights = sum(matrix @ (y[j] * x[j]) for j in range(i)) / i
                assert abs(said[b, i, 0] - weights @ prompt.xs[b, i]) < 1e-10


def test_it_is_better_than_plain_descent_where_inputs_are_skewed():
    task = build_task("linear_regression", dimensions=4, examples=24)
    prompt = prompts(task, batch=200)
    scale = torch.tensor([3.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    xs = prompt.xs * scale
    ys = (xs * torch.randn(200, 1, 4, generator=torch.Generator().manual_seed(1)).double()).sum(-1, keepdim=True)
    inputs = torch.cat([xs, torch.cat([torch.zeros(200, 1, 5), torch.cat([xs, ys], -1)[:, :-1]], 1)], -1)
    covariance = tuple(map(tuple, scale.square().diag().tolist()))

    def error(made):
        return (made.build(torch.float64)(inputs) - ys)[:, 12:].square().mean()

    best = error(PreconditionedConstruction(4, 18, covariance))
    assert best < 0.8 * min(error(GradientDescentConstruction(4, 1, rate)) for rate in (0.02, 0.05, 0.1, 0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 5}, "gd_construction is written for dimensions 20, the task has 5; give dimensions: 5"),
        ({"layout": "interleaved"}, "gd_construction reads the layout 'paired', the task has 'interleaved'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(InputError) as caught:
        GradientDescentConstruction().spec().for_task(build_task("linear_regression", **options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_of_tokens_is_refused():
    with pytest.raises(InputError, match=r"gd_construction reads prompts of examples \(x, y\) with one output"):
        GradientDescentConstruction().spec().for_task(build_task("copy"))


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (((1.0,),), "expected 2 rows of 2 numbers"),
        (((1.0, 0.5), (0.4, 1.0)), "expected a symmetric matrix"),
        (((1.0, 2.0), (2.0, 1.0)), "eigenvalues are all positive"),
    ],
)
def test_what_is_no_covariance_is_refused(covariance, message):
    with pytest.raises(InputError, match=message):
        build_model("preconditioned_gd_construction", dimensions=2, covariance=covariance)


def test_the_state_serves_token_by_token():
    made = GradientDescentConstruction(3, 3, 0.1)
    model, inputs = made.build(torch.float64), prompts(build_task("linear_regression", dimensions=3, examples=8)).inputs
    whole, state, parts = model(inputs), None, []
    for i in range(8):
        said, state = model.read(inputs[:, i : i + 1], state)
        parts.append(said)
    assert apart(torch.cat(parts, 1), whole) < 1e-12
