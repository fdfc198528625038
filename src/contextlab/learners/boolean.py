"""Learners of Boolean functions from labelled examples: inputs of signs -1 and +1, labels -1 and +1.

Predictions are logits of +1. An algorithm that names a label only gets its confidence from its own record in the
prompt so far (`LabelLearner`), so that its cross-entropy can be compared, too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.learners.answers import SMOOTHING
from contextlab.learners.base import RegressionLearner, before
from contextlab.learners.gf2 import eliminate
from contextlab.registry import register

LEAST_LOGIT = 1e-2
"""Least logit of a label that is named, so that it counts as named however bad the record is."""

Share = Annotated[float, Field(ge=0, lt=1)]
Flip = Annotated[float, Field(ge=0, lt=0.5)]


class LabelLearner(RegressionLearner):
    """A learner that names labels; their logits are the log odds of its record so far (Krichevsky-Trofimov)."""

    @abstractmethod
    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Label i in -1, +1, or 0 where undecided, [B, n, k], from the examples before i and xs[:, i]."""

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        labels = self.decide(xs, ys)
        right, wrong = before((labels * ys > 0).double()), before((labels * ys < 0).double())
        return labels * ((right + 0.5) / (wrong + 0.5)).log().clamp(min=LEAST_LOGIT)


def _certain(noise: float = 0.0) -> float:
    """The logit of a label that is known but for noise."""
    doubt = max(noise, SMOOTHING)
    return math.log((1 - doubt) / doubt)


def log_odds(yes: Tensor, no: Tensor) -> Tensor:
    """The log odds of two masses [...], within what `SMOOTHING` allows."""
    share = (yes / (yes + no)).nan_to_num(0.5)  # no mass on either side: nothing is known
    return torch.logit(share.clamp(SMOOTHING, 1 - SMOOTHING))


@register("learner", "label_frequency", family="boolean")
@dataclass(frozen=True)
class LabelFrequency(RegressionLearner):
    """The log odds of the labels so far, whatever the inputs (Krichevsky-Trofimov)."""

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        return ((before((ys > 0).double()) + 0.5) / (before((ys < 0).double()) + 0.5)).log()


def nearest_before(xs: Tensor) -> Tensor:
    """Of each input the nearest one before it, the earliest of several, [B, n]; 0 of the first. xs: signs [B, n, d]."""
    count = xs.shape[1]
    order = torch.arange(count, device=xs.device)
    alike = (xs @ xs.mT) * count - order  # integers: the tie goes to the smaller index
    return alike.masked_fill(order >= order.unsqueeze(1), -torch.inf).argmax(2)


@register("learner", "earliest_neighbour", family="boolean", papers=("2310.03016",), cases=({}, {"certain_from": 8}))
@dataclass(frozen=True)
class EarliestNeighbour(LabelLearner):
    """The label of the nearest example; of the earliest one where several are equally near.

    certain_from: from this example on, labels are known to follow this rule; None for never.
    """

    certain_from: NonNegativeInt | None = None

    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        labels = ys.gather(1, nearest_before(xs).unsqueeze(2).expand(-1, -1, ys.shape[-1]))
        return torch.cat([torch.zeros_like(labels[:, :1]), labels[:, 1:]], 1)

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        logits = super().predict(xs, ys)
        if self.certain_from is not None:
            logits[:, self.certain_from :] = logits[:, self.certain_from :].sign() * _certain()
        return logits


@register("learner", "gf2_elimination", family="boolean", papers=("2310.03016",))
@dataclass(frozen=True)
class ParityElimination(RegressionLearner):
    """Gaussian elimination over GF(2): certain where x is a sum of inputs seen, undecided elsewhere.

    Bayes-optimal where all parities are equally likely and labels have no noise: where x is not such a sum, half of
    the parities that fit predict +1. The parity is of the number of +1 among the relevant inputs, +1 for odd.
    """

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        found = eliminate(xs > 0, ys > 0)
        sure = torch.where(found.values, 1.0, -1.0).to(xs) * _certain()
        return torch.where(found.spanned.unsqueeze(-1), sure, 0.0)


@register(
    "learner",
    "elimination",
    family="boolean",
    papers=("2310.03016",),
    cases=({}, {"disjunction": True, "negations": False}),
)
@dataclass(frozen=True)
class Elimination(LabelLearner):
    """The elimination algorithm: the conjunction of all literals that no positive example has contradicted.

    For disjunctions, its mirror image: no literal that a negative example satisfied.

    disjunction: learn a disjunction instead.
    negations: literals may be negated.
    """

    disjunction: bool = False
    negations: bool = True

    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        sign = -1 if self.disjunction else 1  # a disjunction is false where a conjunction of its negations is true
        false = (xs * sign < 0).unsqueeze(3)  # literals that are false: [B, n, d, 2], plain and negated
        if self.negations:
            false = torch.cat([false, ~false], 3)
        gone = before((false.unsqueeze(-1) & (ys * sign > 0)[:, :, None, None]).double()) > 0
        holds = ~(false.unsqueeze(-1) & ~gone).any(3).any(2)
        return torch.where(holds, sign, -sign).to(xs)


@register(
    "learner",
    "taught",
    family="boolean",
    papers=("2310.03016",),
    cases=({}, {"terms": 3, "negations": True, "mirrored": True}),
)
@dataclass(frozen=True)
class Taught(LabelLearner):
    """Reads the function off a teaching sequence that it knows to come first; see the task `boolean`.

    It makes no error on conjunctions and disjunctions; with several terms, only where one that is not taught yet
    matters.

    terms: taught one after another.
    negations: literals may be negated, and each term begins with two examples.
    mirrored: disjunction or CNF: all signs flipped.
    noise: probability that a label is flipped.
    """

    terms: PositiveInt = 1
    negations: bool = False
    mirrored: bool = False
    noise: Flip = 0.0

    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        sign, heads, count = (-1 if self.mirrored else 1), (2 if self.negations else 1), xs.shape[1]
        xs = xs * sign
        place = torch.arange(count, device=xs.device)
        start = torch.zeros(len(xs), dtype=torch.int64, device=xs.device)
        true = torch.zeros(xs.shape[:2], dtype=torch.bool, device=xs.device)
        for _ in range(self.terms):
            at = (start[:, None] + torch.arange(heads, device=xs.device)).clamp(max=count - 1)
            head = xs.gather(1, at.unsqueeze(-1).expand(-1, -1, xs.shape[-1]))
            literals = torch.where(head[:, :1] == head[:, -1:], head[:, :1], 0)  # the same in both heads
            if not self.negations:
                literals = literals.clamp(min=0)
            since = place - start[:, None]  # the term is known from its last head on; its heads satisfy it
            holds = (xs * literals >= literals.abs()).all(2) & (since >= heads - 1)
            true = true | holds | ((since >= 0) & (since < heads))
            start = start + heads + literals.squeeze(1).count_nonzero(1)
        return torch.where(true, sign, -sign).to(xs).unsqueeze(-1).expand_as(ys)

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        return self.decide(xs, ys) * _certain(self.noise) if self.terms == 1 else super().predict(xs, ys)


@register(
    "learner", "taught_parity", family="boolean", papers=("2310.03016",), cases=({}, {"relevant": 3, "noise": 0.1})
)
@dataclass(frozen=True)
class TaughtParity(RegressionLearner):
    """Reads a sparse parity off a teaching sequence that it knows to come first; see the task `boolean_function`.

    The variables that are +1 in one of the first inputs are the relevant ones; it makes no error on such prompts.

    relevant: variables, and inputs that teach them.
    noise: probability that a label is flipped.
    """

    relevant: PositiveInt = 2
    noise: Flip = 0.0

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        on = xs > 0
        known = on[:, : self.relevant].cummax(1).values  # those taught by the input itself, too
        place = torch.arange(xs.shape[1], device=xs.device).clamp(max=self.relevant - 1)
        odd = (on & known[:, place]).sum(2, keepdim=True) % 2 == 1
        return torch.where(odd, 1.0, -1.0).to(xs).expand_as(ys) * _certain(self.noise)


@register("learner", "perceptron", family="boolean", papers=("2310.03016",))
@dataclass(frozen=True)
class Perceptron(LabelLearner):
    """The perceptron with a bias, one pass: weights move by y x at each example that they get wrong."""

    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        xs = torch.cat([xs, torch.ones_like(xs[..., :1])], 2)
        weights, labels = xs.new_zeros(len(xs), xs.shape[2], ys.shape[2]), []
        for x, y in zip(xs.unbind(1), ys.unbind(1), strict=True):
            score = (x.unsqueeze(1) @ weights).squeeze(1)
            labels.append(score.sign())
            weights = weights + x.unsqueeze(2) * (y * (score * y <= 0)).unsqueeze(1)
        return torch.stack(labels, 1)


@register("learner", "winnow", family="boolean", papers=("2310.03016",), cases=({}, {"negations": True}))
@dataclass(frozen=True)
class Winnow(LabelLearner):
    """Winnow, one pass: the weights of true literals are multiplied or divided at each mistake (Littlestone, 1988).

    Mistakes grow with the relevant variables and the logarithm of all, for disjunctions and other thresholds with
    weights of no less than 0. The threshold is the number of literals, the weights begin at 1.

    factor: by which weights grow and shrink.
    negations: has a weight for each negated variable, too.
    """

    factor: Annotated[float, Field(gt=1)] = 2.0
    negations: bool = False

    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        true = (xs > 0).to(xs)
        if self.negations:
            true = torch.cat([true, 1 - true], 2)
        size = true.shape[2]
        weights, labels = true.new_ones(len(xs), size, ys.shape[2]), []
        for x, y in zip(true.unbind(1), ys.unbind(1), strict=True):
            yes = (x.unsqueeze(1) @ weights).squeeze(1) >= size
            label = torch.where(yes, 1.0, -1.0).to(ys)
            labels.append(label)
            step = (y - label) / 2  # +1, 0 or -1
            weights = weights * self.factor ** (x.unsqueeze(2) * step.unsqueeze(1))
        return torch.stack(labels, 1)
