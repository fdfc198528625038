"""Bayesian learners: posterior means under Gaussian priors, and mixtures of them weighed by the evidence."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner, before
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

MOST_SUPPORTS = 5000
"""Supports that `SparsePosterior` enumerates at most; its memory and time grow with their number."""


class BayesLearner(RegressionLearner):
    """A learner that says how likely the examples were, too, so that it can be a member of a mixture."""

    @abstractmethod
    def condition(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction i [B, n, k], and the log-density of the examples before i [B, n, k], each output alone.

        xs: [B, n, d] float64.
        ys: [B, n, k] float64.
        """

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        return self.condition(xs, ys)[0]


def condition_gaussian(covariance: Tensor, mean: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and log-densities of all prefixes from one factorisation, as `BayesLearner.condition` says.

    With K = L L^T and z = L^-1 (y - mean), the leading blocks of L and z are those of the prefix; z_j is the
    innovation of example j in units of L_jj, its standard deviation given the examples before.

    covariance: of the ys of a prompt, noise included, [B, n, n].
    mean: of the ys, [B, n, 1] or [B, n, k].
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        raise InputError(
            "the noise is smaller than the rounding of the prior's covariance; give the learner more noise"
        )
    z = torch.linalg.solve_triangular(factor, ys - mean, upper=False)
    spread = factor.diagonal(dim1=1, dim2=2).log().unsqueeze(-1) + math.log(2 * math.pi) / 2
    return mean + factor.tril(-1) @ z, before(-z.square() / 2 - spread)


def mix(parts: Sequence[tuple[Tensor, Tensor]], prior: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture's `condition` from its members' (`parts`) and their probabilities before (`prior`, [M])."""
    predictions, evidence = (torch.stack(each) for each in zip(*parts, strict=True))
    joint = evidence + prior.to(evidence).log()[:, None, None, None]
    return (joint.softmax(0) * predictions).sum(0), joint.logsumexp(0)


@register("learner", "basis_posterior", family="functions", papers=("2306.04891",), cases=())
@dataclass(frozen=True, eq=False)
class BasisPosterior(BayesLearner):
    """The posterior mean of y = phi(x) . w + noise with independent Gaussian weights: exact for such functions.

    basis: phi, a function [B, n, d] -> [B, n, p].
    noise: standard deviation of the noise on y.
    scale: standard deviation of the weights, one for all or [p].
    mean: of the weights, [p]; None for 0.
    """

    basis: Callable[[Tensor], Tensor]
    noise: PositiveFloat
    scale: Tensor | PositiveFloat = 1.0
    mean: Tensor | None = None

    def condition(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        features = self.basis(xs)
        scaled = features * (self.scale.to(features) if isinstance(self.scale, Tensor) else self.scale)
        covariance = scaled @ scaled.mT
        covariance.diagonal(dim1=1, dim2=2).add_(self.noise**2)
        mean = features @ torch.zeros_like(features[0, 0]) if self.mean is None else features @ self.mean.to(features)
        return condition_gaussian(covariance, mean.unsqueeze(-1), ys)


@register("learner", "bayes_mixture", family="functions", papers=("2306.04891", "2311.00871"), cases=())
@dataclass(frozen=True)
class BayesMixture(BayesLearner):
    """The mean of its members' predictions, weighed by how likely each is after the examples.

    Bayes-optimal where each prompt is drawn by one member, unknown which: model selection in context.

    members: learners that compute their evidence, such as `BasisPosterior`.
    prior: their probabilities before any example; None for equal ones.
    """

    members: tuple[Any, ...]
    prior: tuple[PositiveFloat, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members or not all(isinstance(member, BayesLearner) for member in self.members):
            raise InputError("members: a mixture needs at least one learner, each with evidence (a BayesLearner)")
        if self.prior is not None and len(self.prior) != len(self.members):
            raise InputError(f"prior: {len(self.prior)} probabilities for {len(self.members)} members; give one each")

    def condition(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        prior = torch.tensor(self.prior or (1.0,) * len(self.members), dtype=xs.dtype)
        return mix([member.condition(xs, ys) for member in self.members], prior / prior.sum())


@register("learner", "member_oracle", family="functions", cases=())
@dataclass(frozen=True)
class MemberOracle(Learner):
    """What one of its members predicts, the one that drew the prompt (`prompt.hidden["member"]`): an oracle.

    members: learners, in the order in which the task numbers them.
    """

    members: tuple[Any, ...]

    def __call__(self, prompt: Prompt) -> Tensor:
        if prompt.hidden is None or "member" not in prompt.hidden:
            raise InputError("member_oracle needs a prompt that says which member drew it, such as fourier_series's")
        answers = torch.stack([member(prompt) for member in self.members])
        return answers[prompt.hidden["member"], torch.arange(prompt.batch, device=answers.device)]


@register("learner", "sparse_posterior", family="functions", papers=("2208.01066",), cases=({"sparsity": 2},))
@dataclass(frozen=True)
class SparsePosterior(BayesLearner):
    """The posterior mean of sparse linear functions: every support that the weights may have, weighted by its evidence.

    Bayes-optimal where `sparsity` weights, chosen uniformly, are Gaussian and the others are zero. One update of
    each support's Gaussian an example (recursive least squares), all supports and prompts at once.

    sparsity: weights that are not zero.
    noise: standard deviation of the noise on y.
    weight_scale: standard deviation of the weights that are not zero.
    active: the weights that are not zero are among the first so many dimensions; None for all.
    """

    sparsity: PositiveInt
    noise: PositiveFloat = 1e-3
    weight_scale: PositiveFloat = 1.0
    active: PositiveInt | None = None

    def condition(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        d = xs.shape[-1] if self.active is None else min(self.active, xs.shape[-1])
        if self.sparsity > d or math.comb(d, self.sparsity) > MOST_SUPPORTS:
            raise InputError(
                f"sparsity {self.sparsity} of {d} dimensions has {math.comb(d, self.sparsity)} supports; "
                f"sparse_posterior enumerates 1 to {MOST_SUPPORTS}"
            )
        supports = torch.tensor(list(itertools.combinations(range(d), self.sparsity)), device=xs.device)
        rows = max(1, 2**22 // (len(supports) * self.sparsity**2))  # prompts at once, to bound the memory
        parts = [self._condition(x, y, supports) for x, y in zip(xs.split(rows), ys.split(rows), strict=True)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _condition(self, xs: Tensor, ys: Tensor, supports: Tensor) -> tuple[Tensor, Tensor]:
        spread = self.weight_scale**2 * torch.eye(self.sparsity, dtype=xs.dtype, device=xs.device)
        spread = spread.expand(len(xs), len(supports), -1, -1)  # covariance of the weights, [B, M, s, s]
        mean = xs.new_zeros(len(xs), len(supports), self.sparsity, ys.shape[-1])
        evidence = xs.new_full((len(xs), len(supports), ys.shape[-1]), -math.log(len(supports)))
        predictions, evidences = [], []
        for i in range(xs.shape[1]):
            x = xs[:, i][:, supports].unsqueeze(-1)  # [B, M, s, 1]
            answer = (x * mean).sum(2)
            predictions.append((evidence.softmax(1) * answer).sum(1))
            evidences.append(evidence.logsumexp(1))
            pull = spread @ x
            variance = (x * pull).sum(2) + self.noise**2
            miss = ys[:, i].unsqueeze(1) - answer
            evidence = evidence - (miss.square() / variance + (2 * math.pi * variance).log()) / 2
            mean = mean + pull / variance.unsqueeze(2) * miss.unsqueeze(2)
            spread = spread - pull * pull.mT / variance.unsqueeze(-1)
        return torch.stack(predictions, 1), torch.stack(evidences, 1)
