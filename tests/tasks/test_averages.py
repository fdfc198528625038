"""Means over long prompts that look at a part of the places."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab import build_task
from contextlab.learners.time_series import normal_points, stable
from contextlab.tasks import dynamical_systems
from contextlab.tasks.averages import mean_of, strides


@pytest.mark.parametrize("count", [1, 2, 256, 257, 1000, 4097, 131_072])
def test_strides_lead_to_the_last_place(count):
    found = strides(count)
    assert sum(found) == count - 1
    assert len(found) < 1200
    assert found[:256] == [1] * min(count - 1, 256)


def test_a_mean_is_exact_for_lines_and_short_prompts_and_close_for_what_settles():
    assert mean_of(lambda place: 3.0 - 2 * place, 100_000) == pytest.approx(3 - 99_999)
    assert mean_of(lambda place: float(place**3), 200) == pytest.approx(sum(i**3 for i in range(200)) / 200)
    count, slow = 20_000, [math.exp(-i / 300) for i in range(20_000)]
    assert mean_of(slow.__getitem__, count) == pytest.approx(sum(slow) / count, rel=1e-3)


def test_the_mean_square_of_a_long_autoregression_is_that_of_a_loop():
    task = build_task("autoregression", order=2, length=700)
    coefficients = normal_points(2**14, 2) * task.deviation
    coefficients = coefficients[stable(coefficients)][:, :, None]
    step = torch.cat([coefficients.mT, torch.tensor([[1.0, 0.0]]).double().expand(len(coefficients), 1, 2)], 1)
    covariance, total = torch.eye(2, dtype=torch.float64).expand(len(step), 2, 2), 0.0
    for _ in range(698):
        covariance = step @ covariance @ step.mT + torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
        total += covariance[:, 0, 0].mean().item()
    assert task.chance()["squared_error"] == pytest.approx(total / 698, rel=1e-4)


def test_the_chance_of_the_longest_prompts_takes_seconds_at_most(monkeypatch):
    """Each took minutes, or memory for thousands of long series."""
    monkeypatch.setattr(dynamical_systems, "MOST_SIMULATED", 64)
    for name, options, size, lengths, close in [
        ("autoregression", {"order": 1}, "length", (60_000, 131_072), 0.02),
        ("dynamical_system", {"dimensions": 2}, "length", (64, 131_072), 0.05),
        ("superposition", {"numbers": 120}, "examples", (5_000, 10_000), 0.01),
    ]:
        first, last = (dict(build_task(name, **options, **{size: each}).chance()) for each in lengths)
        assert first == pytest.approx(last, rel=close), name
