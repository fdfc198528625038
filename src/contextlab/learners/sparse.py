"""Orthogonal matching pursuit. Other learners of sparse weights: lasso (regression), the exact posterior (bayes)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.learners.base import RegressionLearner, apply, gram, moment
from contextlab.registry import register

FLAT = 1e-10
"""Residual inner products below this share of the largest at the start are rounding: the pursuit ends there."""


@register("learner", "omp", family="functions", cases=({}, {"sparsity": 2}))
@dataclass(frozen=True)
class OrthogonalMatchingPursuit(RegressionLearner):
    """Orthogonal matching pursuit: take the input most correlated with what is left over, fit all taken, repeat.

    All prefixes take their next input at once, on Gram matrices. It ends for a prefix that is fitted exactly.

    sparsity: inputs taken, at most one less than there are examples and never more than dimensions.
    """

    sparsity: PositiveInt = 3

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        # one problem for each prompt, prefix and output: [B, n, k, ...]
        g, b = gram(xs).unsqueeze(2), moment(xs, ys).mT
        length = g.diagonal(dim1=-2, dim2=-1).sqrt()
        usable = length > 0
        length = torch.where(usable, length, 1)
        eye = torch.eye(xs.shape[-1], dtype=xs.dtype, device=xs.device)
        examples = torch.arange(xs.shape[1], device=xs.device)[:, None, None]
        taken = torch.zeros_like(b)
        weights = torch.zeros_like(b)
        floor = FLAT * (b.abs() / length).amax(-1, keepdim=True)
        for step in range(min(self.sparsity, xs.shape[-1])):
            slope = (b - (g @ weights.unsqueeze(-1)).squeeze(-1)).abs() / length
            slope = slope.masked_fill((taken > 0) | ~usable, 0)
            height, best = slope.max(-1, keepdim=True)
            more = (height > floor) & (examples > step)
            taken = taken.scatter_add(-1, best, more.to(taken))
            block = torch.where(taken.unsqueeze(-1) * taken.unsqueeze(-2) > 0, g, eye)
            factor = torch.linalg.cholesky_ex(block).L
            weights = torch.cholesky_solve((b * taken).unsqueeze(-1), factor).squeeze(-1)
        return apply(xs, weights.mT)
