"""Functions of one direction, y = f(w . x), f a known polynomial: the best affine predictor, and fits of w."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.learners.base import RegressionLearner
from contextlab.learners.bayes import BayesLearner, condition_gaussian
from contextlab.registry import register


@register("learner", "single_index_process", family="functions", papers=("2404.03558",), cases=())
@dataclass(frozen=True)
class SingleIndexProcess(BayesLearner):
    """A Gaussian process with the moments of y = f(w . x), f a known polynomial, w uniform on the unit sphere.

    No predictor that is affine in the outputs has a smaller expected squared error over w. The posterior of w is not
    Gaussian, so that fits of w (`single_index_fits`) are better once the examples leave few directions.

    coefficients: of f, the constant first.
    noise: standard deviation of the noise on y.
    """

    coefficients: tuple[float, ...]
    noise: PositiveFloat

    def condition(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        mean, second = self.moments(xs)
        covariance = second - mean * mean.mT
        covariance.diagonal(dim1=1, dim2=2).add_(self.noise**2)
        return condition_gaussian(covariance, mean, ys)

    def moments(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        """E f(w . x_i), [B, n, 1], and E f(w . x_i) f(w . x_j), [B, n, n].

        A monomial's mean under N(0, I) follows from Isserlis' theorem (pairs of factors: m between the two points, the
        others within one); on the sphere it is smaller by the Gaussian's E |w|^(j + k).
        """
        size = xs.shape[-1]
        norms = xs.square().sum(-1, keepdim=True)  # [B, n, 1]
        across = xs @ xs.mT
        mean, second = torch.zeros_like(norms), torch.zeros_like(across)
        for j, left in enumerate(self.coefficients):
            if j % 2 == 0:
                mean += left * _double(j) / radius(size, j) * norms ** (j // 2)
            for k, right in enumerate(self.coefficients):
                if (j + k) % 2 or not left * right:
                    continue
                for m in range(min(j, k), -1, -2):
                    a, b = (j - m) // 2, (k - m) // 2
                    pairings = math.factorial(j) * math.factorial(k) / (math.factorial(m) * _half(a) * _half(b))
                    inside = norms**a * (norms**b).mT
                    second += left * right * pairings / radius(size, j + k) * inside * across**m
        return mean, second


@register("learner", "single_index_fits", family="functions", papers=("2404.03558",), cases=())
@dataclass(frozen=True)
class SingleIndexFits(RegressionLearner):
    """The mean of many fits of w on the unit sphere to y = f(w . x), f a known polynomial, each by its likelihood.

    From `starts` uniform directions (and their opposites) the Levenberg-Marquardt method minimises the squared error;
    w is normalised after each step. While several directions explain the examples, the mean over the fits stands for
    the posterior mean; it is not exact, because a fit's share of the starts is not its share of the posterior.

    coefficients: of f, the constant first.
    noise: standard deviation of the noise on y.
    starts: directions that are fitted, with their opposites twice as many.
    steps: of each fit.
    every: a fit at `every`, 2 * `every`, ... examples; predictions between use the last fit.
    seed: of the starts.
    """

    coefficients: tuple[float, ...]
    noise: PositiveFloat
    starts: PositiveInt = 8
    steps: PositiveInt = 25
    every: PositiveInt = 1
    seed: NonNegativeInt = 0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        even = torch.randn(self.starts, xs.shape[-1], generator=generator, dtype=xs.dtype).to(xs.device)
        first = torch.cat([even, -even]) / torch.cat([even, even]).norm(dim=1, keepdim=True)
        answer = torch.empty_like(ys)
        rows = max(1, 2**16 // (len(first) * max(xs.shape[1], xs.shape[2] ** 2)))  # prompts that stay in the cache
        for x, y, out in zip(xs.split(rows), ys.split(rows), answer.split(rows), strict=True):
            for start in range(0, xs.shape[1], self.every):
                weights, share = self._fit(x[:, :start], y[:, :start, 0], first.expand(len(x), -1, -1))
                place = slice(start, start + self.every)
                values = _polynomial(self.coefficients, weights @ x[:, place].mT)  # [B, starts, examples]
                out[:, place] = (share.unsqueeze(-1) * values).sum(1).unsqueeze(-1)
        return answer

    def _fit(self, xs: Tensor, ys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Directions [B, starts, d] fitted to all examples, and their shares [B, starts]. ys: [B, n]."""
        slope = tuple(k * value for k, value in enumerate(self.coefficients))[1:]
        products = (xs.unsqueeze(-1) * xs.unsqueeze(-2)).flatten(2)  # [B, n, d d]
        unit = torch.eye(xs.shape[-1], dtype=xs.dtype, device=xs.device)
        damping = torch.full_like(weights[..., 0], 0.1)

        def errors(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            along = at @ xs.mT
            miss = _polynomial(self.coefficients, along) - ys.unsqueeze(1)
            return along, miss, miss.square().sum(-1)

        along, miss, loss = errors(weights)
        for _ in range(self.steps if xs.shape[1] else 0):
            gain = _polynomial(slope, along)
            curvature = (gain.square() @ products).unflatten(-1, unit.shape)
            # Nothing on the diagonal would be singular while the examples leave some directions free.
            damped = curvature + (damping[..., None, None] + 1e-10) * unit
            step = torch.linalg.solve(damped, (gain * miss) @ xs)
            tried = weights - step
            tried = tried / tried.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            new = errors(tried)
            better = new[2] < loss
            weights = torch.where(better.unsqueeze(-1), tried, weights)
            along, miss = (torch.where(better.unsqueeze(-1), a, b) for a, b in zip(new[:2], (along, miss), strict=True))
            loss = torch.where(better, new[2], loss)
            damping = torch.where(better, damping / 5, damping * 4).clamp(1e-12, 1e8)
        return weights, (-loss / (2 * self.noise**2)).softmax(-1)


def _polynomial(coefficients: tuple[float, ...], at: Tensor) -> Tensor:
    values = torch.zeros_like(at)
    for coefficient in reversed(coefficients):
        values = values * at + coefficient
    return values


def radius(size: int, power: int) -> float:
    """E |g|^power of g ~ N(0, I) in `size` dimensions, for an even power."""
    return float(math.prod(size + 2 * i for i in range(power // 2)))


def _double(power: int) -> int:
    """(power - 1)!! of an even power: E g^power of a standard normal g."""
    return math.prod(range(1, power, 2))


def _half(pairs: int) -> int:
    """2^pairs pairs!: the orders of `pairs` pairs."""
    return 2**pairs * math.factorial(pairs)
