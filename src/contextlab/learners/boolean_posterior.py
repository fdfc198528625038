"""Posteriors over Boolean functions that are too many to list, approximated: assumed densities and message passing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner
from contextlab.learners.boolean import Flip, Share, log_odds
from contextlab.registry import register


@register(
    "learner",
    "literal_posterior",
    family="boolean",
    papers=("2310.03016",),
    cases=({}, {"negative": 0.0, "disjunction": True, "planted": 0.0}, {"slip": 0.1, "noise": 0.05}),
)
@dataclass(frozen=True)
class LiteralPosterior(RegressionLearner):
    """The posterior of a conjunction's literals, each variable kept alone (assumed-density filtering).

    Each example updates exactly the probabilities that a variable is absent, plain or negated; only the dependence
    between variables, which the update creates, is dropped. Close to Bayes-optimal where a version space is too large
    to enumerate.

    positive: probability that a variable is in the conjunction.
    negative: probability that its negation is.
    planted: share of inputs that were made to satisfy the conjunction; others are uniform.
    noise: probability that a label is flipped.
    slip: probability that the label is positive for other reasons, such as another term, where the conjunction fails.
    disjunction: learn a disjunction, all signs flipped.
    """

    positive: Share = 0.15
    negative: Share = 0.15
    planted: Share = 0.3
    noise: Flip = 0.0
    slip: Share = 0.0
    disjunction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive + self.negative > 1:
            raise InputError(
                f"positive {self.positive} and negative {self.negative} are chances of one variable; "
                f"negative can be at most {1 - self.positive:g}"
            )

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        sign = -1 if self.disjunction else 1
        chances = xs.new_tensor([1 - self.positive - self.negative, self.positive, self.negative])
        q = chances.expand(len(xs), xs.shape[2], 3)  # of each variable: absent, plain, negated
        answers = []
        for x, y in zip((sign * xs).unbind(1), (sign * ys).unbind(1), strict=True):
            logit, q = self.meet(q, x, y)
            answers.append(sign * logit)
        return torch.stack(answers, 1)

    def meet(self, q: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The logit [B, 1] of a positive label at x [B, d], and the variables' chances q [B, d, 3] after y [B, 1]."""
        kept = torch.stack([torch.ones_like(x), (x > 0).to(x), (x < 0).to(x)], 2)
        # Three ways to meet x, each with its chance (over that of an even draw) and the variables' chances then:
        # even and satisfied; made to satisfy, so twice as likely for each literal; even and not satisfied.
        even, even_chance = _condition(q, kept)
        made, made_chance = _condition(q, kept * x.new_tensor([1.0, 2.0, 2.0]))
        unmet = (q - even_chance[:, None, None] * even).clamp(min=0)
        unmet = unmet / unmet.sum(2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        unmet_chance = (1 - even_chance).clamp(min=0)
        chance = torch.stack(
            [(1 - self.planted) * even_chance, self.planted * made_chance, (1 - self.planted) * unmet_chance], 1
        )
        slip = self.slip * (1 - self.noise) + (1 - self.slip) * self.noise
        positive = x.new_tensor([1 - self.noise, 1 - self.noise, slip])
        yes, no = chance * positive, chance * (1 - positive)
        share = torch.where(y > 0, yes, no)
        total = share.sum(1, keepdim=True)
        possible = total > 0  # an example that no conjunction explains changes nothing
        share = share / torch.where(possible, total, 1)
        mixed = (share[:, :, None, None] * torch.stack([even, made, unmet], 1)).sum(1)
        return log_odds(yes.sum(1, keepdim=True), no.sum(1, keepdim=True)), torch.where(possible.unsqueeze(2), mixed, q)


def _condition(q: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """The chances [B, d, 3] of each variable after a likelihood that is a product, and the product's mean [B]."""
    joint = q * likelihood
    mean = joint.sum(2, keepdim=True)
    return joint / mean.clamp(min=torch.finfo(q.dtype).tiny), mean.squeeze(2).prod(1)


@register(
    "learner",
    "halfspace_posterior",
    family="boolean",
    papers=("2310.03016",),
    cases=({}, {"mean": 0.0, "variance": 4.0, "threshold_variance": 1.0, "noise": 0.1}),
)
@dataclass(frozen=True)
class HalfspacePosterior(RegressionLearner):
    """The posterior of a half-space's weights, kept Gaussian (assumed-density filtering; Minka, 2001).

    Each example updates mean and covariance of Gaussian weights exactly; the posterior is then approximated by a
    Gaussian again. For version spaces that are too large to enumerate; it does not use that weights are integers.

    mean: of each weight, before.
    variance: of each weight, before.
    threshold: mean of t in w . x > t.
    threshold_variance: of t.
    noise: probability that a label is flipped.
    """

    mean: float = 0.3
    variance: PositiveFloat = 0.21
    threshold: float = 0.5
    threshold_variance: NonNegativeFloat = 0.0
    noise: Flip = 0.0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        d = xs.shape[2]
        xs = torch.cat([xs, -torch.ones_like(xs[..., :1])], 2)
        mean = xs.new_tensor([self.mean] * d + [self.threshold]).expand(len(xs), -1)
        spread = torch.diag(xs.new_tensor([self.variance] * d + [self.threshold_variance])).expand(len(xs), -1, -1)
        tiny = torch.finfo(xs.dtype).eps * self.variance
        answers = []
        for x, y in zip(xs.unbind(1), ys.unbind(1), strict=True):
            pull = (spread @ x.unsqueeze(2)).squeeze(2)
            scale = (x * pull).sum(1, keepdim=True).clamp(min=tiny).sqrt()
            margin = (mean * x).sum(1, keepdim=True) / scale
            answers.append(log_odds(probit(margin, self.noise)[0], probit(-margin, self.noise)[0]))
            _, slope, bend = probit(y * margin, self.noise)
            mean = mean + pull / scale * y * slope
            shrink = bend / scale.square()
            spread = spread - shrink.unsqueeze(2) * pull.unsqueeze(2) * pull.unsqueeze(1)
        return torch.stack(answers, 1)


@register(
    "learner",
    "halfspace_messages",
    family="boolean",
    papers=("2310.03016",),
    cases=({}, {"values": (-1, 0, 1), "chances": (0.15, 0.7, 0.15), "thresholds": (-0.5, 0.5), "noise": 0.1}),
)
@dataclass(frozen=True)
class HalfspaceMessages(RegressionLearner):
    """The posterior of a half-space's weights by approximate message passing (generalised: Rangan, 2011).

    It knows the values that a weight can have, and iterates on all examples of a prefix, all prefixes at once; w . x
    is taken to be Gaussian. Near the optimum for many variables with uniform, independent inputs; without a guarantee
    for others.

    values: of each weight.
    chances: of the values.
    thresholds: t in w . x > t, equally likely.
    noise: probability that a label is flipped.
    steps: iterations.
    inertia: share of the last iterate that is kept, against oscillation.
    """

    values: tuple[int, ...] = (0, 1)
    chances: tuple[PositiveFloat, ...] = (0.7, 0.3)
    thresholds: tuple[float, ...] = (0.5,)
    noise: Flip = 0.0
    steps: PositiveInt = 12
    inertia: Share = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) != len(self.chances):
            raise InputError(
                f"chances: {len(self.chances)} chances for {len(self.values)} values {self.values}; give one each"
            )

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        count, size = xs.shape[1], xs.shape[2] * len(self.values)
        rows = max(1, 2**22 // (count * max(count, size)))  # prompts at once, to bound the memory
        parts = []
        for x, y in zip(xs.split(rows), ys.split(rows), strict=True):
            parts.append(torch.stack([self._pass(x, label) for label in y.unbind(2)], 2))
        return torch.cat(parts)

    def _pass(self, xs: Tensor, ys: Tensor) -> Tensor:
        """xs: [B, n, d], ys: [B, n]. Returns logits [B, n]."""
        before = torch.ones_like(xs[0] @ xs[0].T).tril(-1)  # example m is before prediction p: [p, m]
        weight, threshold = (
            (xs.new_tensor(self.values), xs.new_tensor(self.chances).log()),
            (xs.new_tensor(self.thresholds), xs.new_zeros(len(self.thresholds))),
        )
        # Of the weights and of the threshold, whose input is -1, for every prefix: mean and variance.
        mean, spread = _among(*weight, torch.zeros_like(xs), 0)
        cut, cut_spread = _among(*threshold, torch.zeros_like(xs[..., :1]), 0)
        labels, pull = ys.unsqueeze(1), torch.zeros_like(before)
        for _ in range(self.steps):
            variance = (spread.sum(2, keepdim=True) + cut_spread).clamp(min=1e-6)
            z = labels * (mean @ xs.mT - cut - variance * pull) / variance.sqrt()
            _, slope, bend = probit(z, self.noise)
            pull = self.inertia * pull + (1 - self.inertia) * labels * slope / variance.sqrt() * before
            precision = (bend / variance * before).sum(2, keepdim=True).clamp(min=1e-9)
            news = _among(*weight, mean + pull @ xs / precision, precision)
            cuts = _among(*threshold, cut - pull.sum(2, keepdim=True) / precision, precision)
            mean, spread, cut, cut_spread = (
                self.inertia * old + (1 - self.inertia) * new
                for old, new in zip((mean, spread, cut, cut_spread), (*news, *cuts), strict=True)
            )
        variance = (spread.sum(2) + cut_spread.squeeze(2)).clamp(min=1e-6)
        margin = ((mean * xs).sum(2) - cut.squeeze(2)) / variance.sqrt()
        return log_odds(probit(margin, self.noise)[0], probit(-margin, self.noise)[0])


def _among(values: Tensor, weights: Tensor, centre: Tensor, precision: Tensor | int) -> tuple[Tensor, Tensor]:
    """Mean and variance of numbers among `values` with log-weights, seen as `centre` with a Gaussian error."""
    reach = values.abs().max() + 100  # beyond, the nearest value has all the weight in any case
    far = (values - centre.clamp(-reach, reach).unsqueeze(-1)).square()
    share = (weights - far * (precision.unsqueeze(-1) if isinstance(precision, Tensor) else precision) / 2).softmax(-1)
    mean = (share * values).sum(-1)
    return mean, (share * (values - mean.unsqueeze(-1)).square()).sum(-1)


def probit(z: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """P(a label agrees with a standard Gaussian margin z [...]), flipped with probability `noise`; the slope of
    its logarithm, and how fast that falls."""
    z = z.clamp(min=-30)  # so that its density is above zero
    bell = (-z.square() / 2).exp()
    low = torch.special.erfcx(-z.clamp(max=0) / math.sqrt(2)) * bell / 2  # `ndtr` itself is 0 from -10 on
    chance = noise + (1 - 2 * noise) * torch.where(z < 0, low, torch.special.ndtr(z))
    slope = (1 - 2 * noise) * bell / math.sqrt(2 * math.pi) / chance
    return chance, slope, slope * (slope + z)
