"""What an option's docstring says of a distribution holds: a moment in closed form, at five standard errors.

Moments of more particular kinds stand with their tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import build_task, registry
from contextlab.prompt import Task
from contextlab.tasks.hmm import concepts
from contextlab.testing.tasks import generator


def hold(values: Tensor, expected: float) -> None:
    """The mean of independent values [n] is the expected one."""
    values = values.double()
    error = abs(values.mean().item() - expected)
    assert error < 5 * values.std().item() / math.sqrt(len(values)) + 1e-9, f"{values.mean():.4g}, not {expected:.4g}"


def with_option(name: str, *words: str) -> list[Any]:
    """The tasks with an option of which the docstring says one of these."""
    return [
        pytest.param(entry, id=entry.name)
        for entry in registry.entries("task")
        for option in entry.parameters
        if option.name == name and option.help in words
    ]


@pytest.mark.parametrize("entry", with_option("noise", "standard deviation of the noise on y."))
def test_noise_on_y_has_the_variance_that_it_says(entry: registry.Entry) -> None:
    """It is drawn last, so that the same generator draws the same prompts without it."""
    quiet = entry.build(**{**entry.cases[0], "noise": 0.0}).sample(300, generator(1))
    prompt = entry.build(**{**entry.cases[0], "noise": 0.7}).sample(300, generator(1))
    assert torch.equal(prompt.xs, quiet.xs)
    added = prompt.ys - quiet.ys
    hold(added.flatten(), 0.0)
    hold(added.flatten().square(), 0.49)
    hold((added[:, 1:] * added[:, :-1]).flatten(), 0.0)


SCALES = "root of the mean square of each coordinate of x.", "standard deviation of x in each direction, on average."


@pytest.mark.parametrize("entry", with_option("input_scale", *SCALES))
def test_inputs_have_the_mean_square_of_their_scale(entry: registry.Entry) -> None:
    prompt = entry.build(**{**entry.cases[0], "input_scale": 1.7}).sample(2000, generator(2))
    drawn = prompt.xs[prompt.scored[:, prompt.at]]  # no outliers
    hold(drawn.square().mean(1), 1.7**2)


def test_noise_beside_outliers_has_its_variance() -> None:
    prompt = build_task("outlier_regression", dimensions=4, examples=24, noise=0.7).sample(300, generator(1))
    clean = prompt.xs @ prompt.hidden["weights"]
    hold((prompt.ys - clean)[prompt.scored[:, prompt.at]].flatten().square(), 0.49)


def regression(**options: Any) -> Task:
    task: Task = build_task("linear_regression", **{"dimensions": 6, "examples": 8, **options})
    return task


@pytest.mark.parametrize(
    ("options", "trace"),
    [
        ({}, 6),
        ({"rank": 2}, 6),
        ({"spectrum": "skewed"}, 6),
        ({"spectrum": 0.5, "rank": 3}, 6),
        ({"inputs": "clustered", "clusters": 2}, 6),
        ({"active_dimensions": 4}, 4),
        ({"active_dimensions": 4, "rank": 2}, 4),
    ],
)
def test_covariances_of_regression_keep_their_trace(options: dict[str, Any], trace: int) -> None:
    xs = regression(**options, input_scale=0.5).sample(2000, generator(3)).xs
    hold(xs.square().sum(2).mean(1), 0.25 * trace)
    assert not xs[..., trace:].any()


@pytest.mark.parametrize(("sparsity", "pool"), [(None, None), (2, None), (None, 4000)])
def test_weights_of_regression_have_their_scale(sparsity: int | None, pool: int | None) -> None:
    prompt = regression(weight_scale=1.3, sparsity=sparsity, pool=pool).sample(2000, generator(4))
    weights = torch.linalg.lstsq(prompt.xs.double(), prompt.ys.double()).solution.squeeze(-1)
    hold(weights.square().sum(1), 1.69 * (sparsity or 6))
    if sparsity is not None:
        assert ((weights.abs() > 1e-4).sum(1) <= sparsity).all()


@pytest.mark.parametrize("stay", [0.0, 0.3, 0.8])
def test_the_share_of_staying_is_the_trace_of_the_values_matrix(stay: float) -> None:
    """A mixture of permutations, of which each place goes to itself once in `values` times."""
    task = build_task("hmm_mixture", vocabulary=9, values=4, slots=3, models=2, length=4, stay=stay)
    traces = [concepts(task.replace(pool_seed=seed), "cpu").value.diagonal().mean() for seed in range(150)]
    hold(torch.stack(traces), stay + (1 - stay) / 4)


@pytest.mark.parametrize("noise", [0.1, 0.35])
def test_labels_are_turned_as_often_as_the_noise_says(noise: float) -> None:
    options = {"dimensions": 6, "examples": 16, "function": "conjunction"}
    quiet, prompt = (build_task("boolean_function", **options, noise=n).sample(400, generator(5)) for n in (0.0, noise))
    hold((quiet.ys != prompt.ys).flatten(), noise)


@pytest.mark.parametrize("ones", [0.2, 0.75])
def test_bits_that_are_counted_are_ones_as_often_as_said(ones: float) -> None:
    task = build_task("count_and_copy", ask="count", ones=ones, shortest=10, longest=10)
    prompt = task.sample(400, generator(6))
    one = [token for token in range(task.input_size) if task.symbol(token) == "1"]
    assert len(one) == 1
    hold((prompt.inputs[:, :10] == one[0]).flatten(), ones)


def test_needles_without_a_depth_stand_evenly() -> None:
    """At the line that is next, so that moments of the depth hold up to a line in a hundred."""
    places = {}
    for depth in (0.0, 1.0, None):
        task = build_task("needle", length=2000, depth=depth)
        places[depth] = task.sample(20 if depth is not None else 120, generator(7)).hidden["fact"].double()
    share = (places[None] - places[0.0].mean()) / (places[1.0].mean() - places[0.0].mean())
    hold(share, 1 / 2)
    hold(share.square(), 1 / 3)


RECALL: dict[str, Callable[[Any], int]] = {
    "associative_recall": lambda task: task.vocabulary // 2,
    "overwritten_recall": lambda task: task.vocabulary // 2,
    "multi_value_recall": lambda task: task.vocabulary // 2,
    "chained_recall": lambda task: task.vocabulary,
}


@pytest.mark.parametrize("name", RECALL)
def test_all_symbols_of_a_vocabulary_are_used_evenly(name: str) -> None:
    options = {"chained_recall": {"chains": 3}, "overwritten_recall": {"pairs": 4, "updates": 2}}
    task = build_task(name, vocabulary=32, length=64, **options.get(name, {"pairs": 4}))
    first = task.sample(4000, generator(8)).inputs[:, 0]
    assert stats.chisquare(torch.bincount(first, minlength=RECALL[name](task))).pvalue > 1e-4


def test_features_of_linear_bandits_have_the_variance_that_they_say() -> None:
    features = [build_task("linear_bandit", arms=8, dimensions=4, feature_seed=seed).features for seed in range(60)]
    hold(torch.stack(features).flatten().square(), 1 / 4)
    means = build_task("linear_bandit", arms=8, dimensions=4).problems(4000, generator(9), "cpu")["direction"]
    hold(means.square().sum(1), 1.0)
