"""Preconditioned gradient descent on least squares: what layers of linear attention can compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner, apply, gram, moment
from contextlab.registry import register


@register("learner", "preconditioned_gd", family="functions", papers=("2306.00297",), cases=({}, {"steps": 3}))
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
    """

    steps: PositiveInt = 1
    covariance: Tensor | None = None
    noise: NonNegativeFloat = 0.0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        d = xs.shape[-1]
        covariance = torch.eye(d) if self.covariance is None else self.covariance
        if covariance.shape != (d, d):
            raise InputError(f"covariance is {list(covariance.shape)}, the prompt's inputs have {d} dimensions")
        values, vectors = torch.linalg.eigh(covariance.to(xs))
        count = torch.arange(xs.shape[1], dtype=xs.dtype, device=xs.device).clamp(min=1)[:, None]
        a = 1 / ((1 + 1 / count) * values + (values.sum() + self.noise) / count)
        preconditioner = (vectors * a.unsqueeze(1)) @ vectors.T  # [n, d, d]
        curvature, pull = gram(xs) / count.unsqueeze(-1), moment(xs, ys) / count.unsqueeze(-1)
        weights = preconditioner @ pull
        for _ in range(self.steps - 1):
            weights = weights + preconditioner @ (pull - curvature @ weights)
        return apply(xs, weights)
