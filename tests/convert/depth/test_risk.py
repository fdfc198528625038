"""The bound on a risk: its p-value as published, and how often it is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from contextlab.convert.depth.risk import fewest, last_bounded, p_value


def naive(risk, count, bound):
    """min(exp(-n h(r, b)), e P(Bin(n, b) <= ceil(n r))), as Learn then Test writes it."""
    a = min(risk, bound)
    h = (a * math.log(a / bound) if a else 0) + (1 - a) * math.log((1 - a) / (1 - bound))
    hits = range(math.ceil(round(count * risk, 6)) + 1)
    return min(
        math.exp(-count * h), math.e * sum(math.comb(count, k) * bound**k * (1 - bound) ** (count - k) for k in hits), 1
    )


def test_the_p_value_is_the_published_one():
    for count in (1, 20, 137):
        for risk in (0.0, 0.01, 1 / 20, 0.1, 3 / 20, 0.5, 1.0):
            for bound in (0.02, 0.1, 0.5):
                assert p_value(risk, count, bound) == pytest.approx(naive(risk, count, bound), rel=1e-9)
    assert p_value(0.05, 5000, 0.1) < 1e-20
    assert p_value(3 * 0.1 / 3, 10, 0.3) == pytest.approx(naive(0.1, 10, 0.3))  # 0.10000000000000002 is one of ten


@pytest.mark.parametrize("bound", [0.05, 0.2])
def test_a_risk_at_the_bound_passes_no_oftener_than_it_may(bound):
    """Exactly, of losses that are 0 or 1: how many of each number of hits pass, times how probable it is."""
    for count in (60, 200):
        probable = [math.comb(count, k) * bound**k * (1 - bound) ** (count - k) for k in range(count + 1)]
        for level in (0.05, 0.1, 0.3):
            passing = sum(p for k, p in enumerate(probable) if p_value(k / count, count, bound) <= level)
            assert 0 < passing <= level


def test_the_last_setting_before_one_that_fails_is_taken_and_is_seldom_too_bold():
    """Settings of known risks, each prompt's losses going together: wrong in a tenth of draws at most."""
    risks, generator = np.array([0.0, 0.02, 0.06, 0.11, 0.3]), np.random.default_rng(0)
    taken = []
    for _ in range(1000):
        uniform = generator.random(120)
        found = last_bounded(range(5), lambda i, u=uniform: (u < risks[i]).astype(float), 0.1, 0.9)
        assert found is not None
        taken.append(found.value)
    wrong = np.mean(risks[np.array(taken)] > 0.1)
    assert 0 < wrong <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 1000)
    assert np.mean(np.array(taken) >= 2) > 0.2, "and it bounds something"


def test_so_few_losses_say_nothing():
    for bound, confidence in ((0.05, 0.95), (0.1, 0.9), (0.5, 0.6)):
        least = fewest(bound, confidence)
        assert p_value(0.0, least, bound) <= 1 - confidence + 1e-12
        assert p_value(0.0, least - 1, bound) > 1 - confidence
        assert last_bounded([1], lambda _, n=least: np.zeros(n - 1), bound, confidence) is None
    assert fewest(0.05, 0.95) == 59
