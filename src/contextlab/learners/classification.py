"""Logistic and softmax regression by damped Newton steps, for all prompts and prefixes at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.learners.base import RegressionLearner
from contextlab.registry import register

SMALL = 1e-9
"""A fit whose largest slope, over the strength, is below this has converged."""
CACHE = 2**19
"""Numbers in the Hessians that are made at once."""


def fit_logits(xs: Tensor, chosen: Tensor, strength: float, steps: int, reference: bool) -> tuple[Tensor, Tensor]:
    """Weights that minimise cross-entropy + strength |W|^2 / 2 over each prefix, [B, n, C, d], and each example's
    probabilities under each prefix's weights, [B, n, n, C].

    Newton's steps (iteratively reweighted least squares) with Levenberg's damping: a step that does not descend is
    taken back, and the damping grows.

    xs: [B, n, d].
    chosen: which class each example has, [B, n, C] of 0 and 1.
    reference: there is one more class, whose logit is 0; its examples are 0 throughout in `chosen`.
    """
    batch, n, d = xs.shape
    classes = chosen.shape[-1]
    rows = max(1, CACHE // (n * (classes * d) ** 2))
    if batch > rows:  # as many prompts at once as keep their Hessians in the cache
        parts = zip(xs.split(rows), chosen.split(rows), strict=True)
        found = [fit_logits(x, c, strength, steps, reference) for x, c in parts]
        return torch.cat([weights for weights, _ in found]), torch.cat([p for _, p in found])
    seen = torch.ones(n, n, dtype=xs.dtype, device=xs.device).tril(-1).unsqueeze(-1)

    def loss(weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of weights [B, n, C, d]: the losses [B, n], and the probabilities."""
        logits = (weights.flatten(1, 2) @ xs.mT).unflatten(1, (n, classes)).mT  # [B, n, n, C]
        full = torch.cat([logits, torch.zeros_like(logits[..., :1])], -1) if reference else logits
        total = full.logsumexp(-1, keepdim=True)
        miss = ((total - (logits * chosen.unsqueeze(1)).sum(-1, keepdim=True)) * seen).sum((2, 3))
        # Not exp(logits - total): they add up to 1 but for rounding however large the logits are.
        return miss + strength / 2 * weights.square().sum((2, 3)), full.softmax(-1)[..., :classes]

    weights = xs.new_zeros(batch, n, classes, d)
    damping = xs.new_zeros(batch, n, 1)
    value, p = loss(weights)
    for _ in range(steps):
        slope = ((p - chosen.unsqueeze(1)) * seen).mT @ xs.unsqueeze(1) + strength * weights
        if slope.abs().max() < SMALL * strength:
            break
        hessian = curvature(xs, p, strength)
        hessian.diagonal(dim1=2, dim2=3).add_(damping)
        factor = torch.linalg.cholesky_ex(hessian).L
        tried = weights - torch.cholesky_solve(slope.flatten(2).unsqueeze(-1), factor).view_as(weights)
        tried_value, tried_p = loss(tried)
        better = tried_value <= value + 1e-12 * value.abs()  # rounding must not stop the last steps
        weights = torch.where(better[..., None, None], tried, weights)
        p, value = torch.where(better[..., None, None], tried_p, p), torch.where(better, tried_value, value)
        damping = torch.where(better.unsqueeze(-1), damping / 10, (10 * damping).clamp_min(strength))
    return weights, p


def curvature(xs: Tensor, p: Tensor, strength: float) -> Tensor:
    """The Hessians of `fit_logits` where each example has probabilities p [B, n, n, C]: [B, n, C d, C d].

    p: of all classes, or of one of two.
    """
    batch, n, d = xs.shape
    classes = p.shape[-1]
    outer = (xs.unsqueeze(-1) * xs.unsqueeze(-2)).flatten(2)  # [B, n, d d]
    if classes == 1:
        others = [1 - p[..., 0]]
    else:  # not 1 - p: near 1 its rounding is larger than itself
        others = [torch.cat([p[..., :a], p[..., a + 1 :]], -1).sum(-1) for a in range(classes)]
    hessian = xs.new_empty(batch, n, classes, d, classes, d)
    for a in range(classes):
        for b in range(a + 1):
            share = p[..., a] * (-p[..., b] if a != b else others[a])
            block = (share.tril(-1) @ outer).unflatten(2, (d, d))
            hessian[:, :, a, :, b], hessian[:, :, b, :, a] = block, block
    hessian = hessian.view(batch, n, classes * d, classes * d)
    hessian.diagonal(dim1=2, dim2=3).add_(strength)
    return hessian


@register("learner", "logistic", family="functions", cases=({}, {"strength": 0.1, "averaged": False}))
@dataclass(frozen=True)
class LogisticRegression(RegressionLearner):
    """Logistic regression of labels -1 and +1 without a constant; the prediction is the logit of +1.

    strength: weight of |w|^2 / 2; 1 / s^2 for weights N(0, s^2).
    averaged: shrink the logit for what is not known of w: its mean over Laplace's Gaussian posterior, by MacKay's
        approximation. It has the same sign, and less cross-entropy where there are many weights to learn.
    steps: Newton steps, at most; they stop when all fits have converged.
    """

    strength: PositiveFloat = 1.0
    averaged: bool = True
    steps: PositiveInt = 50

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        outputs = []
        for y in ys.unbind(-1):
            weights, p = fit_logits(xs, (y > 0).to(xs).unsqueeze(-1), self.strength, self.steps, True)
            logit = (xs * weights.squeeze(2)).sum(-1)
            if self.averaged:
                logit = logit * _shrink(xs, p, self.strength).squeeze(-1)
            outputs.append(logit)
        return torch.stack(outputs, -1)


@register("learner", "softmax_regression", family="functions", cases=({}, {"strength": 0.1, "averaged": False}))
@dataclass(frozen=True)
class SoftmaxRegression(RegressionLearner):
    """Softmax regression without constants of labels that are one-hot; the prediction is the classes' logits.

    strength: weight of |W|^2 / 2; 1 / s^2 for weights N(0, s^2).
    averaged: shrink each logit for what is not known of its weights, as `LogisticRegression` does.
    steps: Newton steps, at most; they stop when all fits have converged.
    """

    strength: PositiveFloat = 1.0
    averaged: bool = True
    steps: PositiveInt = 50

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        weights, p = fit_logits(xs, ys, self.strength, self.steps, False)
        logits = (weights * xs.unsqueeze(2)).sum(-1)
        return logits * _shrink(xs, p, self.strength) if self.averaged else logits


def _shrink(xs: Tensor, p: Tensor, strength: float) -> Tensor:
    """1 / sqrt(1 + pi v / 8) for each class, [B, n, C]; v is the variance of its logit at x, as `curvature` has it."""
    hessian = curvature(xs, p, strength)
    diagonal = hessian.diagonal(dim1=2, dim2=3)
    most = diagonal.amax(2, keepdim=True)
    diagonal += 4 * diagonal.shape[2] * torch.finfo(most.dtype).eps * most  # what rounding can make it indefinite by
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    classes, d = p.shape[-1], xs.shape[-1]
    blocks = inverse.unflatten(3, (classes, d)).unflatten(2, (classes, d)).diagonal(dim1=2, dim2=4)  # [B, n, d, d, C]
    variance = torch.einsum("bid,bidec,bie->bic", xs, blocks, xs)
    return (1 + math.pi / 8 * variance).rsqrt()
