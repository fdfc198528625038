"""Learners: reference algorithms that answer prompts without training."""

from __future__ import annotations

from typing import Any

from contextlab import registry
from contextlab.learners.base import RegressionLearner
from contextlab.learners.recall import Lookup
from contextlab.learners.regression import (
    Averaging,
    GradientDescent,
    Lasso,
    LeastSquares,
    NearestNeighbours,
    Newton,
    PoolPosterior,
    Ridge,
)
from contextlab.prompt import Learner

__all__ = [
    "Averaging",
    "GradientDescent",
    "Lasso",
    "Learner",
    "LeastSquares",
    "Lookup",
    "NearestNeighbours",
    "Newton",
    "PoolPosterior",
    "RegressionLearner",
    "Ridge",
    "build_learner",
]


def build_learner(name: str, **options: Any) -> Learner:
    """The learner called `name`. Raises InputError on an unknown name and on wrong or missing options."""
    learner: Learner = registry.lookup("learner", name).build(**options)
    return learner
