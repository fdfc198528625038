"""Attention that compares two predictors by their errors and answers by the better one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import InputError
from contextlab.constructions import ModelSelectionConstruction
from contextlab.learners import GradientDescent, KernelSmoother
from contextlab.tasks import build_task
from tests.constructions.agreement import distance, prompts


@settings(max_examples=6, deadline=None)
@given(
    d=st.integers(1, 4),
    examples=st.integers(1, 12),
    steps=st.integers(1, 3),
    temperature=st.sampled_from([None, 0.3]),
    rate=st.sampled_from([0.01, 1.0, 1e3]),
    families=st.sampled_from([("linear",), ("linear", "quadratic")]),
    seed=st.integers(0, 99),
)
def test_it_weighs_its_predictors_by_their_errors(d, examples, steps, temperature, rate, families, seed):
    task = build_task("mixed_regression", dimensions=d, examples=examples, families=families)
    made = ModelSelectionConstruction(d, examples + 1, steps, 0.1, temperature, rate)
    exact, rounded = distance(made, task, seed)
    assert exact < 1e-10
    assert rounded < 1e-6 * max(1.0, rate)


@pytest.mark.parametrize(("family", "usual"), [("linear", 0), ("quadratic", 1)])
def test_at_a_high_rate_it_answers_with_the_one_that_erred_less(family, usual):
    """Which is gradient descent on lines, and mostly the smoother on functions of which no line tells much."""
    prompt = prompts(build_task("mixed_regression", dimensions=2, examples=60, families=(family,)), batch=16)
    made = ModelSelectionConstruction(2, 60, 4, 0.4, rate=1e3)
    said = made.build(torch.float64)(prompt.inputs)[:, -1, 0].detach()
    members = torch.stack([GradientDescent(4, 0.4)(prompt), KernelSmoother()(prompt)])
    errors = (members - prompt.ys).square()[:, :, :-1, 0].sum(-1)
    clear = (errors[0] - errors[1]).abs() > 0.05
    best = errors.argmin(0)
    wanted = members[best, torch.arange(16), -1, 0]
    torch.testing.assert_close(said[clear], wanted[clear], rtol=0, atol=1e-9)
    assert clear.sum() >= 12
    assert (best == usual).sum() >= 12


def test_a_task_with_more_examples_than_it_has_places_for_is_refused():
    with pytest.raises(InputError, match="reads at most 10 examples, the task has 40; give examples: 40"):
        ModelSelectionConstruction(20, 10).spec().for_task(build_task("linear_regression"))
