"""Kernel learners: the softmax-kernel smoother, kernel ridge, and Gaussian processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.learners.base import RegressionLearner
from contextlab.learners.bayes import BayesLearner, condition_gaussian, mix
from contextlab.registry import register

Kernel = Literal["linear", "polynomial", "rbf", "arc_cosine", "agreement"]


def gram_matrix(kernel: Kernel, xs: Tensor, length_scale: float = 1.0, degree: int = 2) -> Tensor:
    """k(x_i, x_j) of every pair of a prompt's inputs, [B, n, n], after x / length_scale.

    kernel: "linear" x . x'; "polynomial" (1 + x . x')^degree; "rbf" exp(-|x - x'|^2 / 2); "arc_cosine" of first
        order, E 2 relu(w . x) relu(w . x') over w ~ N(0, I), the covariance of wide two-layer ReLU networks;
        "agreement" the fraction of coordinates whose signs agree, to the power of `degree`: the covariance of
        random decision trees on signs whose depth is `degree`.
    """
    xs = xs / length_scale
    if kernel == "agreement":
        signs = torch.where(xs > 0, 1.0, -1.0).to(xs)
        return ((1 + signs @ signs.mT / xs.shape[-1]) / 2) ** degree
    if kernel == "rbf":
        # differences, not products: near duplicates must keep their small distance
        return (-torch.cdist(xs, xs, compute_mode="donot_use_mm_for_euclid_dist").square() / 2).exp()
    product = xs @ xs.mT
    if kernel == "linear":
        return product
    if kernel == "polynomial":
        return (1 + product) ** degree
    norms = product.diagonal(dim1=1, dim2=2).sqrt()
    norms = norms.unsqueeze(1) * norms.unsqueeze(2)
    angle = (product / norms.clamp_min(torch.finfo(xs.dtype).tiny)).clamp(-1, 1).arccos()
    return norms / math.pi * (angle.sin() + (math.pi - angle) * angle.cos())


@register("learner", "kernel_smoother", family="functions", papers=("2305.12766",), cases=({}, {"temperature": 0.5}))
@dataclass(frozen=True)
class KernelSmoother(RegressionLearner):
    """The mean of the outputs, weighed by softmax(x . x' / temperature): what one head of softmax attention computes.

    For inputs of equal length it is the Nadaraya-Watson estimate with a Gaussian kernel of variance
    `temperature`.

    temperature: divides x . x'; None for sqrt(d), the attention's usual scale.
    """

    temperature: PositiveFloat | None = None

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        temperature = math.sqrt(xs.shape[-1]) if self.temperature is None else self.temperature
        future = torch.ones(xs.shape[1], xs.shape[1], dtype=torch.bool, device=xs.device).triu()
        weight = (xs @ xs.mT / temperature).masked_fill(future, -torch.inf)[:, 1:].softmax(-1)
        return torch.cat([torch.zeros_like(ys[:, :1]), weight @ ys], 1)


@register("learner", "gaussian_smoother", family="functions", cases=({}, {"variance": 0.5}))
@dataclass(frozen=True)
class GaussianSmoother(RegressionLearner):
    """The Nadaraya-Watson estimate: the mean of the outputs, weighed by exp(-|x - x'|^2 / (2 variance)).

    variance: of the Gaussian kernel, the square of its bandwidth.
    """

    variance: PositiveFloat = 1.0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        # differences, not products, as in `gram_matrix`
        square = torch.cdist(xs, xs, compute_mode="donot_use_mm_for_euclid_dist").square()
        future = torch.ones(xs.shape[1], xs.shape[1], dtype=torch.bool, device=xs.device).triu()
        weight = (-square / (2 * self.variance)).masked_fill(future, -torch.inf)[:, 1:].softmax(-1)
        return torch.cat([torch.zeros_like(ys[:, :1]), weight @ ys], 1)


@register(
    "learner",
    "kernel_ridge",
    family="functions",
    papers=(),
    cases=({}, {"kernel": "polynomial", "degree": 3}, {"kernel": "arc_cosine"}, {"kernel": "agreement"}),
)
@dataclass(frozen=True)
class KernelRidge(RegressionLearner):
    """Kernel ridge regression: the function f that minimises sum (y - f(x))^2 + strength |f|^2 in the kernel's space.

    All prefixes from one factorisation, as in `Ridge`.

    kernel: "linear", "polynomial", "rbf", "arc_cosine" or "agreement"; see `gram_matrix`.
    strength: weight of |f|^2.
    length_scale: divides the inputs.
    degree: of "polynomial" and "agreement".
    """

    kernel: Kernel = "rbf"
    strength: PositiveFloat = 0.01
    length_scale: PositiveFloat = 1.0
    degree: PositiveInt = 2

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        covariance = gram_matrix(self.kernel, xs, self.length_scale, self.degree)
        covariance.diagonal(dim1=1, dim2=2).add_(self.strength)
        return condition_gaussian(covariance, torch.zeros_like(ys[..., :1]), ys)[0]


@register(
    "learner",
    "gaussian_process",
    family="functions",
    papers=(),
    cases=({}, {"kernel": "arc_cosine", "length_scales": (1.0,)}),
)
@dataclass(frozen=True)
class GaussianProcess(BayesLearner):
    """The posterior mean of a Gaussian process of unknown length scale: several, each weighted by its evidence.

    With one length scale it is kernel ridge regression with strength (noise / scale)^2. No predictor that is
    linear in the outputs has a smaller expected squared error on functions of this covariance, Gaussian or not.

    kernel: as in `KernelRidge`.
    length_scales: equally likely a priori.
    noise: standard deviation of the noise on y.
    scale: standard deviation of the function; multiplies the kernel squared.
    degree: of "polynomial" and "agreement".
    offset: variance of a constant added to the function.
    """

    kernel: Kernel = "rbf"
    length_scales: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0, 4.0)
    noise: PositiveFloat = 0.1
    scale: PositiveFloat = 1.0
    degree: PositiveInt = 2
    offset: NonNegativeFloat = 0.0

    def condition(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for length_scale in self.length_scales:
            covariance = self.scale**2 * gram_matrix(self.kernel, xs, length_scale, self.degree) + self.offset
            covariance.diagonal(dim1=1, dim2=2).add_(self.noise**2)
            parts.append(condition_gaussian(covariance, torch.zeros_like(ys[..., :1]), ys))
        return mix(parts, torch.ones(len(parts)) / len(parts))
