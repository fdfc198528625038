"""Learners of time series: autoregression over all prefixes at once, and the posterior of a stable process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.learners.base import RegressionLearner, gram, moment
from contextlab.learners.regression import Ridge
from contextlab.registry import register

Activation = Literal["identity", "tanh"]


def lags(series: Tensor, order: int) -> Tensor:
    """The `order` values before each time, the latest first, zero before the start. [B, T, k] -> [B, T, order * k]."""
    padded = F.pad(series, (0, 0, order, 0))
    return torch.cat([padded[:, order - j : order - j + series.shape[1]] for j in range(1, order + 1)], -1)


def stable(coefficients: Tensor) -> Tensor:
    """Whether x_t = sum_j c_j x_{t-j} + noise is stationary. [..., p], the latest value's first -> [...] bool.

    The order is stepped down one by one (Levinson and Durbin's recursion backwards): a process is stationary where
    every partial autocorrelation on the way lies in (-1, 1).
    """
    inside = torch.ones_like(coefficients[..., 0], dtype=torch.bool)
    while coefficients.shape[-1]:
        last, rest = coefficients[..., -1:], coefficients[..., :-1]
        inside = inside & (last.squeeze(-1).abs() < 1)
        # where it is outside already, any finite number will do
        coefficients = (rest + last * rest.flip(-1)) / torch.where(last.abs() < 1, 1 - last.square(), 1)
    return inside


@lru_cache(maxsize=32)
def normal_points(count: int, size: int) -> Tensor:
    """`count` points [count, size] that spread as N(0, I) does, in pairs (z, -z), so that their mean is exactly 0."""
    points = torch.quasirandom.SobolEngine(size, scramble=True, seed=0).draw(count // 2, dtype=torch.float64)
    points = torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9))
    return torch.cat([points, -points])


@register("learner", "last_value", family="functions", cases=({},))
@dataclass(frozen=True)
class LastValue(RegressionLearner):
    """The value before, as the forecast of the next; zero for the first."""

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        return lags(ys, 1)


@register(
    "learner", "ar_least_squares", family="functions", papers=("2510.09776",), cases=({}, {"order": 2, "strength": 1.0})
)
@dataclass(frozen=True)
class ARLeastSquares(RegressionLearner):
    """Autoregression fitted to the series so far: the next value from the `order` values before it, by least squares.

    Values with fewer than `order` before them are neither fitted nor forecast (zero). With Gaussian coefficients and
    noise, and strength = noise variance / coefficient variance, the forecast is the posterior mean, whatever the first
    values are: each value given those before it is one example of a linear regression.

    order: values before the next one that the fit uses; for vectors, each with all its coordinates.
    strength: weight of the squared coefficients; 0 for ordinary least squares.
    activation: function of the values before, for series such as x_t = W tanh(x_{t-1}) + noise.
    """

    order: PositiveInt = 1
    strength: NonNegativeFloat = 0.0
    activation: Activation = "identity"

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        before = lags(ys.tanh() if self.activation == "tanh" else ys, self.order)[:, self.order :]
        if not before.shape[1]:
            return torch.zeros_like(ys)
        return F.pad(Ridge(self.strength).predict(before, ys[:, self.order :]), (0, 0, self.order, 0))


@register("learner", "ar_posterior", family="functions", cases=({}, {"order": 2}))
@dataclass(frozen=True)
class ARPosterior(RegressionLearner):
    """The posterior mean of an autoregression with Gaussian coefficients that are known to be stable.

    After any prefix the coefficients are Gaussian (as for `ar_least_squares`), conditioned on stability. The mean under
    that condition is the mean of those points of a quasi-random set, spread as the Gaussian, that are stable. The set
    is symmetric: where all its points are stable the mean is exactly the Gaussian's, as it is where none is.

    order: p, values before the next one that it depends on.
    noise: standard deviation of the noise.
    scale: standard deviation of each coefficient before the restriction to stable ones.
    points: of the set, for each prefix; an even number.
    """

    order: PositiveInt = 1
    noise: PositiveFloat = 1.0
    scale: PositiveFloat = 0.5
    points: Annotated[int, Field(ge=2, multiple_of=2)] = 128

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        before, after = lags(ys, self.order)[:, self.order :], ys[:, self.order :]
        if not before.shape[1]:
            return torch.zeros_like(ys)
        rows = max(1, 2**22 // (before.shape[1] * self.points * self.order))  # prompts at once, to bound the memory
        parts = [self._forecast(x, y) for x, y in zip(before.split(rows), after.split(rows), strict=True)]
        return F.pad(torch.cat(parts), (0, 0, self.order, 0))

    def _forecast(self, before: Tensor, after: Tensor) -> Tensor:
        precision = gram(before) / self.noise**2
        precision.diagonal(dim1=-2, dim2=-1).add_(self.scale**-2)
        factor = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve(moment(before, after) / self.noise**2, factor).mT  # [B, n, k, p]
        points = normal_points(self.points, self.order).to(mean)
        # L^-T z has the covariance (L L^T)^-1, that of the coefficients
        offset = torch.linalg.solve_triangular(factor.mT, points.T, upper=True).mT.unsqueeze(2)  # [B, n, 1, S, p]
        inside = stable(mean.unsqueeze(3) + offset).to(mean).unsqueeze(-1)  # [B, n, k, S, 1]
        shift = (inside * offset).sum(3) / inside.sum(3).clamp_min(1)
        return (before.unsqueeze(2) * (mean + shift)).sum(-1)
