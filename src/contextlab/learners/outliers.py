"""Ridge regression on the examples that are not outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from contextlab.learners.base import RegressionLearner, apply
from contextlab.registry import register

NUMBERS = 2**23
"""Numbers in the Gram matrices that are made at once."""


@register("learner", "filtered_ridge", family="functions", papers=("2402.04248",), cases=({}, {"outliers": "repeated"}))
@dataclass(frozen=True)
class FilteredRidge(RegressionLearner):
    """Ridge regression that leaves out the outliers of outlier_regression, which it knows by their inputs.

    outliers: "ones" (every coordinate is 1), or "repeated" (the input has come twice by then).
    strength: weight of |w|^2.
    """

    outliers: Literal["ones", "repeated"] = "ones"
    strength: PositiveFloat = 1e-6

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        rows = max(1, NUMBERS // (xs.shape[1] * max(xs.shape[1], xs.shape[2] ** 2)))
        parts = zip(xs.split(rows), ys.split(rows), strict=True)
        return torch.cat([self._predict(x, y) for x, y in parts])

    def _predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        n, d = xs.shape[1:]
        seen = torch.ones(n, n, dtype=torch.bool, device=xs.device).tril(-1)  # [i, j]: prefix i holds example j
        if self.outliers == "ones":
            fine = (xs != 1).any(-1).unsqueeze(1) & seen
        else:
            twins = torch.cdist(xs, xs, compute_mode="donot_use_mm_for_euclid_dist") == 0
            twins = twins & ~torch.eye(n, dtype=torch.bool, device=xs.device)
            # known[i, j]: an example before i, other than j, has the input of j
            known = torch.nn.functional.pad(twins.cumsum(1), (0, 0, 1, 0))[:, :-1] > 0
            fine = seen & ~known
        kept = fine.to(xs)  # [B, n, n]
        outer = (xs.unsqueeze(-1) * xs.unsqueeze(-2)).flatten(2)
        curvature = (kept @ outer).unflatten(2, (d, d))
        curvature.diagonal(dim1=2, dim2=3).add_(self.strength)
        pull = kept @ (xs.unsqueeze(-1) * ys.unsqueeze(-2)).flatten(2)
        weights = torch.cholesky_solve(pull.unflatten(2, (d, -1)), torch.linalg.cholesky(curvature))
        return apply(xs, weights)
