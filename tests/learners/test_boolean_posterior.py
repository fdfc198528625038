"""Approximate posteriors over Boolean functions against exact ones, and against plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from contextlab import build_task
from contextlab.learners import (
    HalfspaceMessages,
    HalfspacePosterior,
    LiteralPosterior,
    VersionSpace,
)
from contextlab.learners.boolean_posterior import probit
from tests.learners.test_boolean_learners import CLASSES, by_prefix, draw, generator


def test_literals_alone_are_exact_where_nothing_makes_them_dependent() -> None:
    """Before any example; and after positive examples that none was planted among."""
    xs, _ = draw(2, dimensions=4, examples=5)
    ys = torch.ones(3, 5, 1).double()
    alone = LiteralPosterior(planted=0.3).predict(xs, ys)
    exact = VersionSpace("conjunction", planted=0.3).predict(xs, ys)
    torch.testing.assert_close(alone[:, :1], exact[:, :1], atol=1e-4, rtol=1e-4)
    alone = LiteralPosterior(planted=0.0).predict(xs, ys)
    exact = VersionSpace("conjunction").predict(xs, ys)
    torch.testing.assert_close(alone, exact, atol=1e-4, rtol=1e-4)
    mirrored = LiteralPosterior(planted=0.3, disjunction=True).predict(-xs, -ys)
    torch.testing.assert_close(mirrored, -LiteralPosterior(planted=0.3).predict(xs, ys))


@pytest.mark.parametrize("label", [-1, 1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_an_example_changes_each_literal_as_bayes_rule_does(label: int, noise: float) -> None:
    """The chances of each variable after one example, by enumeration of all conjunctions of three variables."""
    learner = LiteralPosterior(positive=0.2, negative=0.1, planted=0.3, noise=noise, slip=0.2)
    prior = {0: 0.7, 1: 0.2, -1: 0.1}
    x = [1, -1, 1]
    mass = {}
    for w in itertools.product(prior, repeat=3):
        true = CLASSES["conjunction"](w, 0.0, x)
        slipped = 0.2 * (1 - noise) + 0.8 * noise
        positive = 1 - noise if true else slipped
        here = 0.7 / 8 + (0.3 / 8 * 2 ** sum(map(abs, w)) if true else 0)
        mass[w] = math.prod(prior[a] for a in w) * here * (positive if label > 0 else 1 - positive)
    expected = torch.tensor(
        [[sum(m for w, m in mass.items() if w[v] == a) / sum(mass.values()) for a in (0, 1, -1)] for v in range(3)]
    )
    q = torch.tensor([0.7, 0.2, 0.1]).double().expand(1, 3, 3)
    _, found = learner.meet(q, torch.tensor([x]).double(), torch.tensor([[label]]).double())
    torch.testing.assert_close(found[0], expected.double(), atol=1e-6, rtol=1e-6)


def test_filters_come_close_to_the_exact_posterior() -> None:
    """In cross-entropy to the optimum (Gaussian weights do not know that weights are whole), and to a rival."""
    for options, name, gap, rival in (
        ({"function": "conjunction", "dimensions": 8}, "literal_posterior", 0.04, "elimination"),
        ({"function": "disjunction", "dimensions": 8, "noise": 0.1}, "literal_posterior", 0.04, "elimination"),
        ({"function": "majority", "dimensions": 12}, "halfspace_messages", 0.08, "halfspace_posterior"),
        ({"function": "majority", "dimensions": 12}, "halfspace_posterior", 0.12, "perceptron"),
        ({"function": "sparse_threshold", "dimensions": 7, "noise": 0.05}, "halfspace_messages", 0.03, "perceptron"),
    ):
        task = build_task("boolean_function", examples=20, **options)
        prompt, learners = task.sample(400, generator()), task.learners()
        assert next(iter(learners)) == "version_space"
        loss = {each: task.loss(learners[each](prompt), prompt).item() for each in ("version_space", name, rival)}
        assert loss["version_space"] < loss[name] < loss["version_space"] + gap
        assert loss[name] < loss[rival] - 0.02


def test_the_probit_holds_far_out() -> None:
    scipy = pytest.importorskip("scipy.stats")
    z = torch.linspace(-30, 8, 77, dtype=torch.float64)
    chance, slope, _ = probit(z, 0.0)
    torch.testing.assert_close(chance.log(), torch.from_numpy(scipy.norm.logcdf(z.numpy())))
    expected = np.exp(scipy.norm.logpdf(z.numpy()) - scipy.norm.logcdf(z.numpy()))
    torch.testing.assert_close(slope, torch.from_numpy(expected))
    for noise in (0.0, 0.1):
        for x in (-29.0, -12.0, -1.0, 2.0, 6.0):
            at = torch.tensor([x - 1e-4, x, x + 1e-4], dtype=torch.float64)
            _, slope, bend = probit(at, noise)
            assert bend[1].item() == pytest.approx((slope[0] - slope[2]).item() / 2e-4, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_messages_step_by_step(noise: float) -> None:
    """The algorithm for one prefix at a time, in loops, with SciPy's normal distribution."""
    scipy = pytest.importorskip("scipy.stats")
    values, chances, thresholds = (-1, 0, 2), (0.2, 0.5, 0.3), (-0.5, 1.5)
    learner = HalfspaceMessages(values, chances, thresholds, noise, steps=5, inertia=0.3)
    xs, _ = draw(3, dimensions=3, examples=6)
    ys = torch.tensor([[1.0 if x[0] + 2 * x[2] > 0.5 else -1.0 for x in row] for row in xs.tolist()]).double()[
        ..., None
    ]
    prior = [(values, np.log(chances))] * 3 + [(thresholds, np.zeros(2))]

    def moments(v: int, centre: float, precision: float) -> tuple[float, float]:
        numbers, weights = np.array(prior[v][0]), np.array(prior[v][1])
        share = np.exp(weights - precision * (numbers - centre) ** 2 / 2)
        share /= share.sum()
        mean = (share * numbers).sum()
        return mean, (share * (numbers - mean) ** 2).sum()

    def chance(z: float) -> float:
        return noise + (1 - 2 * noise) * scipy.norm.cdf(z)

    def answer(X: list, y: list, x: list) -> float:
        rows = [[*row, -1] for row in X]
        mean, spread = (list(each) for each in zip(*(moments(v, 0, 0) for v in range(4)), strict=True))
        pulls = [0.0] * len(rows)
        for _ in range(5):
            variance = sum(spread)
            slopes, bends = [], []
            for row, label, old in zip(rows, y, pulls, strict=True):
                z = label * (np.dot(row, mean) - variance * old) / math.sqrt(variance)
                slope = (1 - 2 * noise) * scipy.norm.pdf(z) / chance(z)
                slopes.append(0.3 * old + 0.7 * label * slope / math.sqrt(variance))
                bends.append(slope * (slope + z) / variance)
            pulls = slopes
            precision = max(sum(bends), 1e-9)
            for v in range(4):
                centre = mean[v] + sum(row[v] * pull for row, pull in zip(rows, pulls, strict=True)) / precision
                new = moments(v, centre, precision)
                mean[v], spread[v] = (0.3 * old + 0.7 * n for old, n in zip((mean[v], spread[v]), new, strict=True))
        margin = np.dot([*x, -1], mean) / math.sqrt(sum(spread))
        return math.log(chance(margin) / chance(-margin))

    torch.testing.assert_close(learner.predict(xs, ys), by_prefix(answer, xs, ys), atol=1e-5, rtol=1e-5)


def test_one_weight_is_a_truncated_gaussian_after_one_example() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for x, y in itertools.product((-1.0, 1.0), repeat=2):
        xs, ys = torch.tensor([[[x], [1.0]]]).double(), torch.tensor([[[y], [1.0]]]).double()
        learner = HalfspacePosterior(mean=0.3, variance=0.8, threshold=0.4)
        low, high = (0.4 / x, np.inf) if x * y > 0 else (-np.inf, 0.4 / x)
        sd = math.sqrt(0.8)
        left = scipy.truncnorm((low - 0.3) / sd, (high - 0.3) / sd, loc=0.3, scale=sd)
        first = scipy.norm.cdf((0.3 * x - 0.4) / sd)
        second = scipy.norm.cdf((left.mean() - 0.4) / left.std())
        expected = torch.logit(torch.tensor([first, second]))
        torch.testing.assert_close(learner.predict(xs, ys).flatten(), expected, atol=1e-6, rtol=1e-6)
