"""Bandit learners against loops over prompts and prefixes, SciPy, scikit-learn and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.linear_model import Ridge

from contextlab.errors import InputError
from contextlab.learners.bandits import (
    BestArmPosterior,
    GreedyArm,
    LowerConfidence,
    PosteriorMeanArm,
    ThompsonSampling,
    UpperConfidence,
)
from contextlab.learners.linear_bandits import LinearThompson, LinUCB
from contextlab.prompt import Prompt
from contextlab.tasks import Bandit, LinearBandit

ARMS = 4
FEATURES = torch.randn(ARMS, 3, generator=torch.Generator().manual_seed(5))


def prompt(batch: int = 5, horizon: int = 25, rewards: str = "gaussian", seed: int = 0) -> Prompt:
    return Bandit(arms=ARMS, horizon=horizon, rewards=rewards).sample(batch, torch.Generator().manual_seed(seed))


def pulls(given: Prompt, row: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Arms and rewards of the first t pulls, step by step."""
    arms, rewards = [], []
    for token in given.inputs[row, 1 : t + 1].numpy().astype(float):
        arms.append(int(np.argmax(token[:-1])))
        rewards.append(token[-1])
    return np.array(arms, dtype=int), np.array(rewards)


def greedy(arms, rewards, k, untried=0.0):
    mine = rewards[arms == k]
    return mine.mean() if len(mine) else untried


def ucb1(arms, rewards, k):
    n = (arms == k).sum()
    return greedy(arms, rewards, k) + math.sqrt(2 * math.log(len(arms)) / n) if n else math.inf


def constant(arms, rewards, k):
    n = (arms == k).sum()
    return greedy(arms, rewards, k) + 0.5 / math.sqrt(n) if n else math.inf


def pessimist(arms, rewards, k):
    return greedy(arms, rewards, k) - 0.8 / max(1, math.sqrt((arms == k).sum()))


def linucb(arms, rewards, k, strength=0.7, width=1.3):
    features = FEATURES.numpy().astype(float)
    v, b = strength * np.eye(3), np.zeros(3)
    for arm, reward in zip(arms, rewards, strict=True):
        v += np.outer(features[arm], features[arm])
        b += reward * features[arm]
    inverse = np.linalg.inv(v)
    return features[k] @ inverse @ b + width * math.sqrt(features[k] @ inverse @ features[k])


@pytest.mark.parametrize(
    ("learner", "index"),
    [
        (GreedyArm(ARMS), greedy),
        (GreedyArm(ARMS, tries_all=True), lambda *a: greedy(*a, untried=math.inf)),
        (UpperConfidence(ARMS), ucb1),
        (UpperConfidence(ARMS, width=0.5, bonus="constant"), constant),
        (LowerConfidence(ARMS), pessimist),
        (LinUCB(FEATURES, strength=0.7, width=1.3), linucb),
        (LinUCB(FEATURES, strength=0.7, width=0.0), lambda *a: linucb(*a, width=0.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_indices_are_those_of_a_loop_over_steps(learner, index) -> None:
    given = prompt()
    answer = learner(given).exp()
    for row in range(given.batch):
        for t in range(given.length):
            values = np.array([index(*pulls(given, row, t), k) for k in range(ARMS)])
            top = np.isclose(values, values.max(), atol=1e-9) if np.isfinite(values.max()) else np.isinf(values)
            assert np.allclose(answer[row, t], top / top.sum(), atol=1e-5), (row, t, values)


@pytest.mark.parametrize(
    "learner",
    [
        GreedyArm(ARMS),
        UpperConfidence(ARMS),
        LowerConfidence(ARMS),
        ThompsonSampling(ARMS),
        PosteriorMeanArm(ARMS),
        BestArmPosterior(ARMS),
        LinUCB(FEATURES),
        LinearThompson(FEATURES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_predictions_are_causal_distributions_and_the_last_is_the_last(learner) -> None:
    given = prompt()
    answer = learner(given)
    assert answer.shape == (5, 26, ARMS)
    assert torch.allclose(answer.exp().sum(-1), torch.ones(5, 26), atol=1e-5)
    assert torch.allclose(learner.last(given), answer[:, -1], atol=1e-5)
    changed = Prompt(given.inputs.clone(), given.targets, given.scored, given.shot)
    changed.inputs[:, 11:] = prompt(seed=9).inputs[:, 11:]
    other = learner(changed)
    assert torch.allclose(other[:, :11], answer[:, :11], atol=1e-6)
    assert not torch.allclose(other[:, 11:], answer[:, 11:], atol=1e-3)


def test_one_arms_posterior_mean_is_scipys() -> None:
    count = torch.tensor([[0.0, 1.0, 7.0, 400.0, 3.0, 50.0]], dtype=torch.float64)
    total = torch.tensor([[0.0, -0.9, 6.9, 100.0, 4.5, -2.0]], dtype=torch.float64)
    for noise in (0.05, 0.3, 2.0):
        got = PosteriorMeanArm(6, noise=noise).mean(count, total)[0].tolist()
        assert got[0] == 0.5
        for value, n, s in zip(got[1:], count[0, 1:].tolist(), total[0, 1:].tolist(), strict=True):
            centre, spread = s / n, noise / math.sqrt(n)
            wanted = stats.truncnorm.mean(-centre / spread, (1 - centre) / spread, loc=centre, scale=spread)
            assert value == pytest.approx(wanted, abs=1e-6)
    got = PosteriorMeanArm(2, "bernoulli").mean(count[:, 1:3], torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    assert torch.allclose(got, torch.tensor([[stats.beta(2, 1).mean(), stats.beta(4, 5).mean()]], dtype=torch.float64))


@pytest.mark.parametrize("rewards", ["gaussian", "bernoulli"])
def test_the_probability_to_be_best_is_scipys_integral(rewards: str) -> None:
    given = prompt(3, 30, rewards, seed=2)
    learners = [BestArmPosterior(ARMS, rewards, grid=512)]
    if rewards == "bernoulli":
        learners.append(ThompsonSampling(ARMS, "beta", grid=512))
    answers = [learner(given).exp() for learner in learners]
    for row, t in ((0, 0), (0, 3), (1, 30), (2, 12)):
        arms, seen = pulls(given, row, t)
        beliefs = []
        for k in range(ARMS):
            n, s = (arms == k).sum(), seen[arms == k].sum()
            if rewards == "bernoulli":
                beliefs.append(stats.beta(1 + s, 1 + n - s))
            elif n:
                spread = 0.3 / math.sqrt(n)
                centre = s / n
                beliefs.append(stats.truncnorm(-centre / spread, (1 - centre) / spread, loc=centre, scale=spread))
            else:
                beliefs.append(stats.uniform())
        for k in range(ARMS):
            mine, others = beliefs[k], beliefs[:k] + beliefs[k + 1 :]

            def density(x: float, mine=mine, others=others) -> float:
                return mine.pdf(x) * math.prod(other.cdf(x) for other in others)

            wanted = integrate.quad(density, 0, 1, limit=200)[0]
            for answer in answers:
                assert answer[row, t, k].item() == pytest.approx(wanted, abs=2e-3)


def test_gaussian_thompson_sampling_is_what_draws_would_choose() -> None:
    given, rng = prompt(3, 40, seed=4), np.random.default_rng(0)
    answer = ThompsonSampling(ARMS, prior_mean=0.2, prior_variance=0.5, noise=0.3)(given).exp()
    for row, t in ((0, 0), (1, 5), (2, 40)):
        arms, seen = pulls(given, row, t)
        draws = []
        for k in range(ARMS):
            mean, variance = 0.2, 0.5
            for reward in seen[arms == k]:  # one observation after another
                gain = variance / (variance + 0.09)
                mean, variance = mean + gain * (reward - mean), variance * (1 - gain)
            draws.append(rng.normal(mean, math.sqrt(variance), 100_000))
        share = np.bincount(np.argmax(draws, axis=0), minlength=ARMS) / 100_000
        assert np.allclose(answer[row, t], share, atol=0.008)


def test_linear_posterior_is_ridge_and_its_samples_are_gaussian() -> None:
    features = FEATURES.numpy().astype(float)
    given, rng = prompt(2, 20, seed=6), np.random.default_rng(1)
    sampled = LinearThompson(FEATURES, prior_variance=0.5, noise=0.3, samples=4096)(given).exp()
    best = LinUCB(FEATURES, strength=0.09 / 0.5, width=0.0)(given).argmax(-1)
    for row, t in ((0, 1), (0, 6), (1, 20)):
        arms, seen = pulls(given, row, t)
        ridge = Ridge(alpha=0.09 / 0.5, fit_intercept=False).fit(features[arms], seen)
        assert best[row, t] == np.argmax(features @ ridge.coef_)
        covariance = np.linalg.inv(np.eye(3) / 0.5 + features[arms].T @ features[arms] / 0.09)
        drawn = rng.multivariate_normal(ridge.coef_, covariance, 100_000) @ features.T
        share = np.bincount(drawn.argmax(1), minlength=ARMS) / 100_000
        assert np.allclose(sampled[row, t], share, atol=0.015)


def test_prompts_of_other_tasks_and_rewards_outside_the_prior_are_refused() -> None:
    with pytest.raises(InputError, match="GreedyArm has 3 arms: it needs inputs"):
        GreedyArm(3)(prompt())
    with pytest.raises(InputError, match="the beta prior needs rewards in"):
        ThompsonSampling(10, "beta")(LinearBandit(horizon=30).sample(8, torch.Generator().manual_seed(0)))
