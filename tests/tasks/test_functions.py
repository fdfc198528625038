"""Function classes: what they draw, what predicting zero costs, and that no learner beats the stated optimum."""

from __future__ import annotations

import math

import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.tasks.functions import FunctionTask

SMALL = {
    "quadratic_regression": {"dimensions": 4, "examples": 12},
    "hermite_regression": {"dimensions": 4, "examples": 12},
    "relu_network": {"dimensions": 4, "examples": 12, "hidden": 6},
    "decision_tree": {"dimensions": 4, "examples": 20, "depth": 2},
    "representation_regression": {"dimensions": 4, "examples": 12, "width": 5, "layers": 2},
}
INPUTS = ["gaussian", "skewed", "clustered"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, **options) -> FunctionTask:
    task = build_task(name, **{**SMALL[name], **options})
    assert isinstance(task, FunctionTask)
    return task


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", SMALL)
def test_chance_is_the_cost_of_predicting_zero(name: str, inputs: str) -> None:
    task = make(name, inputs=inputs, input_scale=1.3, noise=0.4)
    prompt = task.sample(20_000, generator(1))
    each = prompt.targets.square().sum(-1).mean(1).double()  # a prompt's mean; prompts are independent
    assert abs(each.mean() - task.chance()["squared_error"]) < 5 * each.std() / len(each) ** 0.5


CURRICULUM = {
    **SMALL,
    "gaussian_mixture_regression": {"dimensions": 4, "examples": 12},
    "mixed_regression": {
        "dimensions": 4,
        "examples": 12,
        "sparsity": 3,
        "families": ("linear", "sparse", "quadratic", "relu"),
    },
    "monomial_regression": {"dimensions": 4, "examples": 12, "terms": 3, "sets": 3},
    "outlier_regression": {"dimensions": 4, "examples": 12, "rate": 0.0},
}


@pytest.mark.parametrize("name", CURRICULUM)
def test_inactive_dimensions_are_zero_and_chance_knows(name: str) -> None:
    """So that a curriculum over dimensions, as the one of 2208.01066, starts with easier functions."""
    task = build_task(name, **CURRICULUM[name], active_dimensions=2, inputs="skewed", input_scale=1.3)
    prompt = task.sample(20_000, generator(1))
    assert prompt.inputs.shape[2] == build_task(name, **CURRICULUM[name]).input_size
    assert not prompt.xs[..., 2:].any()
    each = prompt.targets.square().sum(-1).mean(1).double()
    assert abs(each.mean() - task.chance()["squared_error"]) < 5 * each.std() / len(each) ** 0.5
    few = task.sample(20, generator(2))
    for learner in task.learners().values():
        assert task.loss(learner(few), few).isfinite()
    with pytest.raises(InputError, match="active_dimensions 5 is more than dimensions 4; at most 4"):
        build_task(name, **CURRICULUM[name], active_dimensions=5)


@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_have_the_moments_that_they_say(inputs: str) -> None:
    task = make("quadratic_regression", inputs=inputs, input_scale=0.7)
    xs = task.sample(30_000, generator(2)).xs
    assert xs is not None
    xs = xs.double()
    for value, expected in (
        (xs.square().mean((1, 2)), 0.49),
        (xs.mean((1, 2)), 0.0),
        ((xs[..., 0] * xs[..., 1]).mean(1), 0.0),
        ((xs[..., 0] * xs[..., 1]).square().mean(1), task.fourth),
        (xs[..., 2].pow(4).mean(1), 3 * task.fourth),
    ):
        assert abs(value.mean() - expected) < 5 * value.std() / len(value) ** 0.5


def test_clusters_are_tight_and_as_many_as_asked() -> None:
    task = make("relu_network", inputs="clustered", clusters=2, dimensions=30, examples=20)
    xs = task.sample(4, generator()).xs
    assert xs is not None
    near = torch.cdist(xs[0], xs[0]) < math.sqrt(30)  # within a cluster about sqrt(2 * 0.1 * 30), between sqrt(60)
    assert len({tuple(row) for row in near.tolist()}) == 2


def test_quadratics_are_linear_in_the_squares() -> None:
    prompt = make("quadratic_regression").sample(50, generator(3))
    features = prompt.xs.square().double()  # type: ignore[union-attr]
    weights = torch.linalg.lstsq(features, prompt.ys.double()).solution  # type: ignore[union-attr]
    torch.testing.assert_close(weights * math.sqrt(3), prompt.hidden["weights"].double(), atol=1e-3, rtol=1e-3)  # type: ignore[index]
    many = build_task("quadratic_regression", dimensions=2, examples=1).sample(5000, generator(4))
    assert scipy.stats.kstest(many.hidden["weights"].flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8])
def test_hermite_polynomials_as_in_scipy(degree: int) -> None:
    task = build_task("hermite_regression", dimensions=3, examples=50, degree=degree)
    prompt = task.sample(3, generator(10))
    weights = prompt.hidden["weights"].double()
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(3, 1, dtype=torch.float64))
    along = (prompt.xs.double() @ weights).numpy()
    expected = sum(
        scipy.special.eval_hermitenorm(k, along) / math.sqrt(math.factorial(k)) for k in range(1, degree + 1)
    )
    torch.testing.assert_close(prompt.ys, torch.tensor(expected / math.sqrt(degree)).float(), rtol=1e-4, atol=1e-4)
    assert task.chance()["squared_error"] == pytest.approx(1.0)


@pytest.mark.parametrize(("dimensions", "degree"), [(1, 3), (2, 1), (3, 2), (4, 3)])
def test_the_moments_of_hermite_polynomials_are_those_of_draws(dimensions: int, degree: int) -> None:
    """Over many directions and a few points, at five standard errors."""
    task = build_task("hermite_regression", dimensions=dimensions, examples=4, degree=degree, noise=0.1)
    xs = torch.randn(1, 4, dimensions, generator=generator(11), dtype=torch.float64)
    values = task.functions(xs.expand(200_000, -1, -1).float(), generator(12))[0].double().squeeze(-1)
    mean, second = task.learners()["single_index_process"].moments(xs)
    pairs = values.unsqueeze(1) * values.unsqueeze(2)
    for drawn, stated in ((values, mean[0, :, 0]), (pairs, second[0])):
        assert ((drawn.mean(0) - stated).abs() <= 5 * drawn.std(0) / 200_000**0.5 + 1e-6).all()


GRID = 600
"""Angles: the posterior of nine examples is ten times as wide as the way between two."""


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_fits_of_a_direction_are_nearly_the_posterior(degree: int) -> None:
    """In two dimensions the posterior mean is a sum over a fine grid of angles; at one example and at many."""
    task = build_task("hermite_regression", dimensions=2, examples=9, degree=degree, noise=0.3)
    prompt = task.sample(500, generator(13))
    angles = torch.arange(GRID, dtype=torch.float64) * (2 * math.pi / GRID)
    along = prompt.xs.double() @ torch.stack([angles.cos(), angles.sin()])  # [B, n, angles]
    hermite = [
        scipy.special.eval_hermitenorm(k, along.numpy()) / math.sqrt(math.factorial(k) * degree) for k in (1, 2, 3)
    ]
    values = torch.tensor(sum(hermite[:degree]))
    likely = -(values - prompt.ys.double()).square().cumsum(1) / (2 * 0.09)
    learners = task.learners()
    names = ("single_index_fits", "single_index_process")
    answers, excess = {name: learners[name](prompt) for name in names}, {name: torch.zeros(9) for name in names}
    for i in range(9):
        share = likely[:, i - 1].softmax(-1) if i else torch.full_like(likely[:, 0], 1 / GRID)
        exact = (share * values[:, i]).sum(-1)
        for name, gaps in excess.items():
            gaps[i] = (answers[name][:, i, 0] - exact).square().mean()  # above the posterior's own error
    assert excess["single_index_fits"][0] < 0.1
    assert excess["single_index_fits"].max() < 0.25
    assert excess["single_index_fits"][6:].mean() < 0.06
    if degree > 1:
        assert excess["single_index_fits"][2:].mean() < 0.7 * excess["single_index_process"][2:].mean()


def test_a_direction_is_found_from_a_few_examples() -> None:
    task = build_task("hermite_regression", dimensions=4, examples=20, degree=3)
    prompt = task.sample(100, generator(14))
    error = {n: task.errors(a(prompt), prompt)["squared_error"][:, 12:] for n, a in task.learners().items()}
    assert next(iter(error)) == "single_index_fits"
    assert error["single_index_fits"].median() < 1e-6
    assert error["single_index_fits"].mean() < 0.05 < error["single_index_process"].mean()


def test_networks_by_hand() -> None:
    prompt = make("relu_network").sample(3, generator(5))
    first, second = prompt.hidden["first"], prompt.hidden["second"]
    x = prompt.xs[1, 4]
    y = sum(second[1, j, 0] * max(0.0, float(first[1, :, j] @ x)) for j in range(6)) * math.sqrt(2 / 6)
    torch.testing.assert_close(prompt.ys[1, 4, 0], y)
    assert scipy.stats.kstest(first.flatten().numpy(), "norm").pvalue > 1e-3


def test_linear_functions_are_a_split_of_networks() -> None:
    """As in the code of 2208.01066, on the inputs of the networks and as large."""
    task = make("relu_network", inputs="clustered", input_scale=1.5, layout="interleaved", noise=0.2)
    linear = task.splits()["linear functions"]
    assert linear.chance() == task.chance()
    prompt = linear.sample(3, generator(5))
    fitted = torch.linalg.lstsq(prompt.xs.double(), prompt.ys.double()).solution
    assert (prompt.xs.double() @ fitted - prompt.ys).std().item() == pytest.approx(0.2, rel=0.5)


def test_trees_by_hand() -> None:
    task = make("decision_tree", depth=3, examples=40)
    prompt = task.sample(3, generator(6))
    asks, leaves = prompt.hidden["asks"][2].tolist(), prompt.hidden["leaves"][2].tolist()
    for x, y in zip(prompt.xs[2].tolist(), prompt.ys[2, :, 0].tolist(), strict=True):
        node = 0
        while node < 7:
            node = 2 * node + (2 if x[asks[node]] > 0 else 1)
        assert leaves[node - 7] == y
    many = build_task("decision_tree", dimensions=5, examples=1, depth=2).sample(4000, generator(7))
    counts = torch.bincount(many.hidden["asks"].flatten(), minlength=5)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert scipy.stats.kstest(many.hidden["leaves"].flatten().numpy(), "norm").pvalue > 1e-3


def test_the_representation_is_fixed_and_differs_by_seed() -> None:
    task = make("representation_regression")
    xs = torch.randn(2, 7, 4, dtype=torch.float64)
    features = task.basis()(xs)
    assert features.shape == (2, 7, 5)
    assert torch.equal(features, make("representation_regression", noise=2.0).basis()(xs))
    assert not torch.allclose(features, task.splits()["other representation"].basis()(xs))
    again = task.sample(3, generator(1)), task.sample(3, generator(2))
    for prompt in again:
        expected = task.replace(noise=0.0).basis()(prompt.xs) @ prompt.hidden["weights"]
        assert (expected - prompt.ys).std().item() == pytest.approx(task.noise, rel=0.5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quadratic_regression", {"noise": 0.5}),
        ("quadratic_regression", {"noise": 0.5, "inputs": "clustered"}),
        ("representation_regression", {"noise": 0.5, "inputs": "skewed"}),
        ("hermite_regression", {"noise": 0.3}),
        ("hermite_regression", {"noise": 0.3, "degree": 3, "inputs": "clustered"}),
        ("decision_tree", {"noise": 0.3}),
        ("relu_network", {"noise": 0.5, "hidden": 200}),
    ],
)
def test_no_learner_beats_the_stated_optimum(name: str, options: dict) -> None:
    """The exact posterior, or the best linear one among the linear ones; rivals assume twice or half the noise."""
    task = make(name, **options)
    prompt = task.sample(600, generator(8))
    learners = task.learners()
    best = next(iter(learners))
    slow = {"network", "boosted_trees"}
    # On trees and narrow networks greedy fits can win in the end: there only linear predictors are rivals.
    rivals = {n: a for n, a in learners.items() if n not in {best, *slow, "tree"}}
    for factor in (0.5, 2.0):
        rivals[f"noise * {factor}"] = next(iter(task.replace(noise=factor * task.noise).learners().values()))
    reference = task.errors(learners[best](prompt), prompt)["squared_error"].mean(1)
    for rival, learner in rivals.items():
        excess = task.errors(learner(prompt), prompt)["squared_error"].mean(1) - reference
        assert excess.mean() > -4 * excess.std() / len(excess) ** 0.5, rival


def test_the_posterior_error_is_the_one_that_bayes_predicts() -> None:
    """The stated optimum against its own variance: E (f - posterior mean)^2 = k(x, x) - k K^-1 k, averaged."""
    task = make("quadratic_regression", noise=0.5)
    prompt = task.sample(3000, generator(9))
    features = (prompt.xs.double().square() / math.sqrt(3))[:, :8]
    inverse = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + features[:, :7].mT @ features[:, :7] / 0.25)
    variance = (features[:, 7:] @ inverse @ features[:, 7:].mT).flatten() + 0.25
    error = task.errors(task.learners()["bayes"](prompt), prompt)["squared_error"][:, 7].double()
    excess = error - variance
    assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(sorted(SMALL)), st.sampled_from(INPUTS), st.sampled_from(["paired", "interleaved"]))
def test_shapes_and_splits(name: str, inputs: str, layout: str) -> None:
    task = make(name, inputs=inputs, layout=layout)
    splits = task.splits()
    assert next(iter(splits)) == "train"
    assert splits["train"] is task
    for name, split in splits.items():
        prompt = split.sample(2, generator())
        assert prompt.inputs.shape[2] == task.input_size, name
        assert prompt.scored.sum(1).tolist() == [split.examples] * 2
        assert name == "train" or split != task
    assert splits["more examples"].examples == 2 * task.examples


def test_impossible_trees_are_refused() -> None:
    with pytest.raises(InputError, match="degree 9: above 8 rounding spoils the moments"):
        make("hermite_regression", degree=9)
    with pytest.raises(InputError, match="depth 13 has 2.13 leaves; use a depth of at most 12"):
        make("decision_tree", depth=13)
    with pytest.raises(InputError):
        make("relu_network", inputs="cubic")
