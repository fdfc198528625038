"""Autoregression over all prefixes against loops, SciPy's truncated normal, integration on a grid, and roots."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab import build_learner, build_task
from contextlab.learners.time_series import ARLeastSquares, ARPosterior, LastValue, lags, normal_points, stable

few = settings(deadline=None, max_examples=10)


def series(seed: int, batch: int = 2, length: int = 12, size: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, size, generator=generator, dtype=torch.float64).cumsum(1) / 2


def examples(values: Tensor, t: int, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of complete lags before t, what followed each, and the lags of t itself; of one series [T, k]."""
    v = values.numpy()
    past = np.array([np.concatenate([v[s - j] for j in range(1, order + 1)]) for s in range(order, t + 1)])
    return past[:-1], v[order:t], past[-1]


def test_lags_by_hand() -> None:
    values = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    assert lags(values, 2)[0].tolist() == [[0, 0, 0, 0], [1, 10, 0, 0], [2, 20, 1, 10]]


@few
@given(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 2), st.sampled_from([0.0, 0.7]))
def test_least_squares_of_every_prefix(seed: int, order: int, size: int, strength: float) -> None:
    values = series(seed, size=size)
    found = ARLeastSquares(order, strength).predict(values, values)
    for b in range(2):
        for t in range(12):
            expected = np.zeros(size)
            if t > order:
                x, y, query = examples(values[b], t, order)
                penalty = np.sqrt(strength) * np.eye(order * size)
                x, y = np.concatenate([x, penalty]), np.concatenate([y, np.zeros((order * size, size))])
                expected = query @ np.linalg.lstsq(x, y, rcond=1e-9)[0]
            np.testing.assert_allclose(found[b, t].numpy(), expected, atol=1e-5, rtol=1e-5)


@few
@given(st.integers(0, 9999), st.integers(1, 5))
def test_stability_is_that_of_the_roots(seed: int, order: int) -> None:
    coefficients = torch.randn(200, order, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for c, found in zip(coefficients.numpy(), stable(coefficients).tolist(), strict=True):
        largest = np.abs(np.roots(np.concatenate([[1.0], -c]))).max()
        assert abs(largest - 1) < 1e-6 or found == (largest < 1)


def test_points_spread_as_a_gaussian() -> None:
    points = normal_points(2**12, 3)
    assert points.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(points.T @ points / len(points), torch.eye(3).double(), atol=0.02, rtol=0)
    assert scipy.stats.kstest(points[:, 1].numpy(), "norm").pvalue > 0.1


def test_posterior_of_order_1_is_a_truncated_normal() -> None:
    values = series(3, batch=3)
    noise, scale = 0.8, 0.9
    found = ARPosterior(1, noise, scale, points=2**14).predict(values, values)
    for b in range(3):
        for t in range(1, 12):
            x, y, query = examples(values[b], t, 1)
            variance = 1 / ((x * x).sum() / noise**2 + 1 / scale**2)
            mean = variance * (x * y).sum() / noise**2
            low, high = (np.array([-1, 1]) - mean) / variance**0.5
            expected = scipy.stats.truncnorm.mean(low, high, mean, variance**0.5) * query
            np.testing.assert_allclose(found[b, t].numpy(), expected, atol=5e-3 * abs(query).max())


def test_posterior_of_order_2_by_integration() -> None:
    values = series(5, batch=1)
    noise, scale = 1.0, 1.2
    found = ARPosterior(2, noise, scale, points=2**14).predict(values, values)[0]
    axis = np.linspace(-2, 2, 401)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    grid = grid[stable(torch.from_numpy(grid)).numpy()]
    for t in range(2, 12):
        x, y, query = examples(values[0], t, 2)
        log = -((y - x @ grid.T) ** 2).sum(0) / (2 * noise**2) - (grid**2).sum(1) / (2 * scale**2)
        weight = np.exp(log - log.max())
        expected = (weight @ (grid @ query)) / weight.sum()
        np.testing.assert_allclose(found[t].item(), expected, atol=0.02 * np.abs(query).max())


def test_where_all_is_stable_the_posterior_is_ridge() -> None:
    values = series(7).diff(dim=1)  # no trend
    ridge = ARLeastSquares(2, (0.5 / 0.1) ** 2).predict(values, values)
    torch.testing.assert_close(ARPosterior(2, 0.5, 0.1).predict(values, values), ridge)


@pytest.mark.parametrize(
    "learner", [ARLeastSquares(2), ARLeastSquares(2, 0.3, "tanh"), ARPosterior(2, 0.8, 0.6), LastValue()]
)
def test_forecasts_use_the_past_only_and_prompts_do_not_mix(learner) -> None:
    values, other = series(11, batch=3), series(12, batch=3)
    found = learner.predict(values, values)
    for t in (0, 1, 4, 9):
        changed = torch.cat([values[:, :t], other[:, t:]], 1)
        torch.testing.assert_close(learner.predict(changed, changed)[:, : t + 1], found[:, : t + 1])
    for b in range(3):
        torch.testing.assert_close(learner.predict(values[b : b + 1], values[b : b + 1]), found[b : b + 1])
    assert torch.equal(learner.predict(values[:, :1], values[:, :1]), torch.zeros(3, 1, 1))


def test_faster_than_a_loop_over_prefixes() -> None:
    values = series(1, batch=64, length=40)
    learner = ARLeastSquares(3)
    learner.predict(values, values)
    start = time.process_time()
    learner.predict(values, values)
    batched = time.process_time() - start
    start = time.process_time()
    for b in range(8):
        for t in range(4, 40):
            x, y, query = examples(values[b], t, 3)
            query @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert 8 * (time.process_time() - start) > 20 * batched


def test_learners_are_built_by_name_and_answer_any_series() -> None:
    prompt = build_task("waves", length=12, grid=4).sample(2, torch.Generator().manual_seed(0))
    for name in ("ar_least_squares", "ar_posterior", "last_value"):
        assert build_learner(name)(prompt).shape == prompt.targets.shape
