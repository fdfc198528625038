"""Softmax attention as kernel regression and as the nearest neighbour."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import InputError
from contextlab.constructions import KernelSmootherConstruction, NearestNeighbourConstruction
from contextlab.learners import GaussianSmoother
from contextlab.tasks import build_task
from tests.constructions.agreement import distance, prompts

sizes = {"d": st.integers(1, 5), "examples": st.integers(1, 12), "seed": st.integers(0, 99)}


@settings(max_examples=6, deadline=None)
@given(**sizes, kernel=st.sampled_from(["softmax", "gaussian"]), temperature=st.sampled_from([None, 0.3, 4.0]))
def test_kernel_regression(d, examples, seed, kernel, temperature):
    task = build_task("quadratic_regression", dimensions=d, examples=examples)
    exact, rounded = distance(KernelSmootherConstruction(d, examples + 2, kernel, temperature), task, seed)
    assert exact < 1e-10
    assert rounded < 1e-6


@settings(max_examples=6, deadline=None)
@given(**sizes)
def test_the_nearest_neighbour(d, examples, seed):
    task = build_task("linear_regression", dimensions=d, examples=examples, input_scale=3.0)
    assert max(distance(NearestNeighbourConstruction(d, examples), task, seed)) < 1e-6


def test_the_gaussian_smoother_is_as_nadaraya_and_watson_write_it():
    prompt = prompts(build_task("linear_regression", dimensions=3, examples=6))
    said = GaussianSmoother(0.7)(prompt)
    for i in range(1, 6):
        weight = (-(prompt.xs[0, :i] - prompt.xs[0, i]).square().sum(-1) / 1.4).exp()
        assert abs(said[0, i, 0] - (weight @ prompt.ys[0, :i, 0]) / weight.sum()) < 1e-12
    assert said[0, 0, 0] == 0


def test_longer_prompts_than_it_has_places_for_are_refused_in_one_line():
    with pytest.raises(InputError, match="reads at most 10 examples, the task has 40; give examples: 40") as caught:
        KernelSmootherConstruction(20, 10).spec().for_task(build_task("linear_regression"))
    assert "\n" not in str(caught.value)
