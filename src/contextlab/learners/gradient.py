"""Preconditioned gradient descent on least squares, and GD++: what layers of linear attention can compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner, apply, gram, moment
from contextlab.registry import register


@register(
    "learner",
    "preconditioned_gd",
    family="functions",
    papers=("2306.00297", "2306.09927"),
    cases=({}, {"steps": 3}, {"examples": 8}),
)
@dataclass(frozen=True, eq=False)
class PreconditionedGradientDescent(RegressionLearner):
    """Steps w <- w + A (X^T (y - X w)) / i from w = 0, A made for Gaussian inputs of known covariance.

    A has the eigenvectors of the covariance C and the eigenvalues l / ((1 + 1/i) l^2 + (trace C + noise) l / i)
    for l of C. With one step no other A has a smaller expected squared error on weights w ~ N(0, I) and i
    Gaussian examples, which follows from E S^2 = (1 + 1/i) C^2 + (trace C / i) C for S = X^T X / i. One layer of
    linear attention computes such a step, and the optimum of its training is one (2306.00297).

    steps: gradient steps, all with the same A.
    covariance: C, [d, d]; None for the identity.
    noise: variance of the noise on y, over the variance of the weights.
    examples: the i for which A is made, the same at every prefix, as in weights that are trained on prompts of one
        length (2306.09927, Theorem 4.1); None for the examples that there are.
    """

    steps: PositiveInt = 1
    covariance: Tensor | None = None
    noise: NonNegativeFloat = 0.0
    examples: PositiveInt | None = None

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        d = xs.shape[-1]
        covariance = torch.eye(d) if self.covariance is None else self.covariance
        if covariance.shape != (d, d):
            raise InputError(f"covariance is {list(covariance.shape)}, the prompt's inputs have {d} dimensions")
        values, vectors = torch.linalg.eigh(covariance.to(xs))
        count = torch.arange(xs.shape[1], dtype=xs.dtype, device=xs.device).clamp(min=1)[:, None]
        best = count if self.examples is None else torch.full_like(count, self.examples)
        a = 1 / ((1 + 1 / best) * values + (values.sum() + self.noise) / best)
        preconditioner = (vectors * a.unsqueeze(1)) @ vectors.T  # [n, d, d]
        curvature, pull = gram(xs) / count.unsqueeze(-1), moment(xs, ys) / count.unsqueeze(-1)
        weights = preconditioner @ pull
        for _ in range(self.steps - 1):
            weights = weights + preconditioner @ (pull - curvature @ weights)
        return apply(xs, weights)


@register(
    "learner", "gd_plus_plus", family="functions", papers=("2212.07677",), cases=({}, {"steps": 3, "curvature": 0.1})
)
@dataclass(frozen=True)
class GradientDescentPlusPlus(RegressionLearner):
    """GD++: gradient descent on the mean of (y - w . x)^2 / 2 that also changes the inputs (2212.07677, section 3).

    Beside each step all inputs become x <- (I - curvature S) x, S the mean of their own x x^T. With x = P x_0 the step
    is w <- w + step_size P^2 (b - S_0 w), and P <- (I - curvature P S_0 P) P.

    steps: gradient steps.
    step_size: of each.
    curvature: gamma of the change of the inputs; 0 is gradient descent.
    """

    steps: PositiveInt = 2
    step_size: PositiveFloat = 0.1
    curvature: NonNegativeFloat = 0.05

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        count = torch.arange(xs.shape[1], dtype=xs.dtype, device=xs.device).clamp(min=1)[:, None, None]
        s, b = gram(xs) / count, moment(xs, ys) / count
        change, weights = torch.eye(xs.shape[-1]).to(xs).expand_as(s), torch.zeros_like(b)
        for _ in range(self.steps):
            weights = weights + self.step_size * (change @ (change @ (b - s @ weights)))
            change = change - self.curvature * (change @ s @ change @ change)
        return apply(xs, weights)
