"""Classes memorized in the weights, and classes that the prompt shows: two sources of a label, and their mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from contextlab.learners.base import RegressionLearner, before
from contextlab.learners.ngrams import MOST_CELLS
from contextlab.registry import register

Share = Annotated[float, Field(ge=0, le=1)]
FLOOR = 1e-9
"""Probability that is spread over all labels, so that no log-probability is infinite."""


@register("learner", "class_posterior", family="recall", papers=("2312.03002",), cases=())
@dataclass(frozen=True, eq=False)
class ClassPosterior(RegressionLearner):
    """The label of an item of a Gaussian class, from a pool of classes, from the examples shown, or from both.

    An item is (mean + noise e) / sqrt(1 + noise^2) with e ~ N(0, I / d). Its class is

    - of the pool: with probability `bursty` that of an example before (each of them evenly), else drawn from `prior`.
      Which class an example is of is inferred from its item and label, one by one;
    - with probability `new`, one drawn from N(0, I / d) for this prompt, as all its examples are. Then the item is of
      the class of an example before it (each evenly), which is judged by the distance to that example alone.

    With bursty = new = 0 it is the exact posterior of a classifier that does not look at the prompt (in-weights
    learning); with new = 1 a kernel smoother of the examples (in-context learning). Where the first example has none
    before it, the label comes from the pool, or is even when there is none.

    means: of the pool, [K, d].
    labels: of the pool's classes, [K] int64.
    prior: probabilities of the pool's classes, [K].
    noise: within a class, over the spread of the means.
    bursty: share of prompts whose item is of a class shown.
    new: share of prompts of new classes.
    """

    means: Tensor
    labels: Tensor
    prior: Tensor
    noise: PositiveFloat
    bursty: Share = 0.0
    new: Share = 0.0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Log-probabilities [B, n, labels]. ys: one-hot."""
        turn = max(1, MOST_CELLS // (xs.shape[1] * max(len(self.means), xs.shape[1] * ys.shape[-1])))
        return torch.cat([self._predict(x, y) for x, y in zip(xs.split(turn), ys.split(turn), strict=True)])

    def _predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        d, shrink = xs.shape[-1], 1 / (1 + self.noise**2)
        number = torch.arange(xs.shape[1], dtype=xs.dtype, device=xs.device)
        first = (number == 0)[:, None]
        even = 1 / number.clamp(min=1)[:, None]
        seen = torch.ones(xs.shape[1], xs.shape[1], dtype=torch.bool, device=xs.device).tril(-1)

        # log-densities, up to what all have in common
        means, label = self.means.to(xs) * shrink**0.5, F.one_hot(self.labels.to(xs.device), ys.shape[-1]).to(xs)
        variance = self.noise**2 * shrink / d
        of_class = -torch.cdist(xs, means).square() / (2 * variance) - d / 2 * math.log(variance)
        prior = self.prior.to(xs).clamp_min(1e-300).log()  # a steep law leaves nothing to the last classes
        source = prior.expand_as(of_class)
        if self.bursty:
            fits = of_class + prior + (ys @ label.T).log()  # the class has the label that was shown
            shown = before(fits.softmax(2)) * even
            source = torch.where(first, prior, (self.bursty * shown + (1 - self.bursty) * prior.exp()).log())
        each = of_class + source
        most = each.amax(2, keepdim=True)
        parts = [((each - most).exp() @ label).log() + most + _log(1 - self.new)]
        if self.new:
            variance = self.noise**2 * (2 + self.noise**2) * shrink**2 / d  # (1 - shrink^2) / d, also of small noise
            like = -torch.cdist(xs, shrink * xs).square() / (2 * variance) - d / 2 * math.log(variance)
            like = like.masked_fill(~seen, -torch.inf) + even.log()
            from_shown = (like.unsqueeze(-1) + ys.log().unsqueeze(1)).logsumexp(2)
            own = -xs.square().sum(-1, keepdim=True) * d / 2 - d / 2 * math.log(1 / d) - math.log(ys.shape[-1])
            parts.append(torch.where(first, own, from_shown) + math.log(self.new))
        answer = torch.stack(parts).logsumexp(0)
        return ((1 - FLOOR) * answer.softmax(-1) + FLOOR / ys.shape[-1]).log()


def _log(share: float) -> float:
    return math.log(share) if share else -math.inf
