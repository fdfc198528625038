"""Learners of linear bandits, whose rewards are linear in the features of an arm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.learners.bandits import ArmLearner, certain
from contextlab.registry import register


@register("learner", "linucb", family="decisions", papers=("2306.14892",), cases=())
@dataclass(frozen=True, eq=False)
class LinUCB(ArmLearner):
    """Ridge regression of the rewards on the arms' features; the arm of the highest prediction plus its uncertainty.

    With V = strength I + the sum of a a^T over the pulled arms' features a, the uncertainty of an arm is
    width sqrt(a^T V^-1 a). At width 0 and strength = noise variance / prior variance it takes the highest posterior
    mean under a Gaussian prior, which is Bayes-optimal for one choice from given data.

    features: of the arms, [arms, d] float.
    strength: of the ridge regression.
    width: factor of the uncertainty.
    """

    features: Tensor
    strength: PositiveFloat = 1.0
    width: NonNegativeFloat = 1.0

    @property
    def pulled(self) -> int:
        return len(self.features)

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        features = self.features.to(count)
        guess, factor = _regress(features, count, total, self.strength)
        index = guess @ features.T
        if self.width:
            index = index + self.width * torch.cholesky_solve(features.T, factor).mul(features.T).sum(-2).sqrt()
        return certain(index)


@register("learner", "linear_thompson", family="decisions", papers=("2306.14892",), cases=())
@dataclass(frozen=True, eq=False)
class LinearThompson(ArmLearner):
    """Posterior sampling for linear bandits: how often each arm is the best under the posterior of the hidden vector.

    The prior is N(0, prior_variance I), the noise Gaussian. The share is over `samples` quasi-random draws, the same
    each time; an arm that no draw favours keeps a little probability.

    features: of the arms, [arms, d] float.
    prior_variance: of each entry of the hidden vector.
    noise: standard deviation of the rewards.
    samples: draws from the posterior.
    """

    features: Tensor
    prior_variance: PositiveFloat = 1.0
    noise: PositiveFloat = 0.3
    samples: PositiveInt = 256

    @property
    def pulled(self) -> int:
        return len(self.features)

    @property
    def cells(self) -> int:  # type: ignore[override]
        return self.samples

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        features = self.features.to(count)
        arms, size = features.shape
        guess, factor = _regress(features, count, total, self.noise**2 / self.prior_variance)
        engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=0)
        uniform = engine.draw(self.samples, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        normal = torch.special.ndtri(uniform).to(count)
        # The posterior's covariance is noise^2 V^-1, and V = L L^T: L^-T z has the covariance V^-1.
        away = torch.linalg.solve_triangular(factor.mT, normal.T.expand(len(count), -1, -1), upper=True)
        drawn = guess.unsqueeze(-1) + self.noise * away
        value = features @ drawn
        won = (value == value.amax(1, keepdim=True)).to(count).sum(-1)
        return ((won + 1 / arms) / (self.samples + 1)).log()


def _regress(features: Tensor, count: Tensor, total: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The ridge solution [N, d], and the Cholesky factor of strength I + sum of a a^T, [N, d, d]."""
    gram = torch.einsum("nk,kd,ke->nde", count, features, features)
    gram.diagonal(dim1=1, dim2=2).add_(strength)
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve((total @ features).unsqueeze(-1), factor).squeeze(-1), factor
