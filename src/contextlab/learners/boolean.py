"""Learners of Boolean functions from labelled examples: inputs of signs -1 and +1, labels -1 and +1.

Predictions are logits of +1. An algorithm that names a label only gets its confidence from its own record in the
prompt so far (`LabelLearner`), so that its cross-entropy can be compared, too.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.base import RegressionLearner, before
from contextlab.learners.gf2 import eliminate
from contextlab.registry import register

MOST_FUNCTIONS = 2**15
"""Functions that a version space enumerates at most; its memory and time grow with their number."""
LEAST_LOGIT = 1e-2
"""Least logit of a label that is named, so that it counts as named however bad the record is."""

Share = Annotated[float, Field(ge=0, lt=1)]
Flip = Annotated[float, Field(ge=0, lt=0.5)]
ClassName = Literal["conjunction", "disjunction", "halfspace", "parity"]

_USUAL: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "conjunction": ((0, 1, -1), (0.7, 0.15, 0.15)),
    "disjunction": ((0, 1, -1), (0.7, 0.15, 0.15)),
    "halfspace": ((0, 1), (0.7, 0.3)),
    "parity": ((0, 1), (0.5, 0.5)),
}


class LabelLearner(RegressionLearner):
    """A learner that names labels; their logits are the log odds of its record so far (Krichevsky-Trofimov)."""

    @abstractmethod
    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Label i in -1, +1, or 0 where there is no saying, [B, n, k], from the examples before i and xs[:, i]."""

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        labels = self.decide(xs, ys)
        right, wrong = before((labels * ys > 0).double()), before((labels * ys < 0).double())
        return labels * ((right + 0.5) / (wrong + 0.5)).log().clamp(min=LEAST_LOGIT)


def _certain(noise: float = 0.0) -> float:
    """The logit of a label that is known but for noise."""
    doubt = max(noise, SMOOTHING)
    return math.log((1 - doubt) / doubt)


def _logit(yes: Tensor, no: Tensor) -> Tensor:
    """The log odds of two masses, within what `SMOOTHING` allows."""
    share = (yes / (yes + no)).nan_to_num(0.5)  # no mass on either side: nothing is known
    return torch.logit(share.clamp(SMOOTHING, 1 - SMOOTHING))


@register("learner", "label_frequency", family="boolean")
@dataclass(frozen=True)
class LabelFrequency(RegressionLearner):
    """The log odds of the labels so far, whatever the inputs (Krichevsky-Trofimov)."""

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        return ((before((ys > 0).double()) + 0.5) / (before((ys < 0).double()) + 0.5)).log()


@register("learner", "earliest_neighbour", family="boolean", papers=("2310.03016",), cases=({}, {"certain_from": 8}))
@dataclass(frozen=True)
class EarliestNeighbour(LabelLearner):
    """The label of the nearest example; of the earliest one where several are equally near.

    certain_from: the example from which on labels are known to be drawn so; None for never.
    """

    certain_from: NonNegativeInt | None = None

    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        count = xs.shape[1]
        order = torch.arange(count, device=xs.device)
        alike = (xs @ xs.mT) * count - order  # integers: the tie goes to the smaller index
        nearest = alike.masked_fill(order >= order.unsqueeze(1), -torch.inf).argmax(2, keepdim=True)
        labels = ys.gather(1, nearest.expand(-1, -1, ys.shape[-1]))
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

    Bayes-optimal for parities of an even chance each without noise: where x is not such a sum, half of the parities
    that fit say yes. The parity is of the number of +1 among the relevant inputs, +1 for odd.
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
    mirrored: disjunction or CNF: all signs turned.
    noise: chance that a label is turned.
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
    noise: chance that a label is turned.
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


@register(
    "learner",
    "version_space",
    family="boolean",
    papers=("2310.03016",),
    cases=({"function": "parity", "relevant": 2}, {"function": "conjunction", "planted": 0.3, "most": 2**20}),
)
@dataclass(frozen=True)
class VersionSpace(RegressionLearner):
    """The exact posterior over an enumerated class of functions: all those that fit, each by how likely it was.

    Bayes-optimal where the function is drawn as said here. Weights w are drawn for each variable alone, or are 1 for
    `relevant` variables, chosen evenly, and 0 for the others. A conjunction is +1 where each x_v with w_v != 0 has
    its sign, a disjunction where any has; a half-space where w . x > t; a parity where the number of x_v = +1 with
    w_v != 0 is odd.

    function: conjunction, disjunction, halfspace or parity.
    relevant: variables with w = 1; None for all variables drawn alone.
    values: of each w, where they are drawn alone; None for 0, 1, -1 (conjunction, disjunction) and 0, 1 (others).
    chances: of the values; None for even ones where `values` are given, else for those of the task `boolean`: 0.7,
        0.15, 0.15 (conjunction, disjunction), 0.7, 0.3 (halfspace), 0.5, 0.5 (parity).
    thresholds: of half-spaces, t, equally likely.
    planted: share of inputs that were made to satisfy the conjunction (falsify the disjunction); others are even.
        It matters as such an input tells something about the function before its label does.
    noise: chance that a label is turned.
    most: functions that are enumerated at most.
    """

    function: ClassName = "conjunction"
    relevant: PositiveInt | None = None
    values: tuple[int, ...] | None = None
    chances: tuple[PositiveFloat, ...] | None = None
    thresholds: tuple[float, ...] = (0.5,)
    planted: Share = 0.0
    noise: Flip = 0.0
    most: PositiveInt = MOST_FUNCTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        values, chances = self.drawn_alone()
        if len(values) != len(chances):
            raise InputError(f"chances: {len(chances)} chances for {len(values)} values {values}; give one each")
        if self.planted and self.function not in ("conjunction", "disjunction"):
            raise InputError(f"planted is for conjunctions and disjunctions; use 0 for function {self.function!r}")

    def drawn_alone(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The values of each weight and their chances."""
        if self.values is not None:
            return self.values, self.chances or (1 / len(self.values),) * len(self.values)
        values, chances = _USUAL[self.function]
        return values, self.chances or chances

    def size(self, dimensions: int) -> int:
        """Functions (counted with their thresholds) of so many variables."""
        if self.relevant is not None:
            weights = math.comb(dimensions, self.relevant)
        else:
            weights = len(self.drawn_alone()[0]) ** dimensions
        return weights * (len(self.thresholds) if self.function == "halfspace" else 1)

    def functions(self, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [H, d], thresholds [H] and chances [H] of all functions, float64."""
        size = self.size(dimensions)
        if not 1 <= size <= self.most:
            raise InputError(
                f"{self.function} of {dimensions} dimensions"
                + (f" with {self.relevant} relevant" if self.relevant else "")
                + f" has {size} functions; version_space enumerates 1 to {self.most} (`most`)"
            )
        if self.relevant is not None:
            chosen = torch.tensor(list(itertools.combinations(range(dimensions), self.relevant)))
            weights = torch.zeros(len(chosen), dimensions, dtype=torch.float64).scatter_(1, chosen, 1.0)
            chance = torch.ones(len(chosen), dtype=torch.float64)
        else:
            values, chances = (torch.tensor(each, dtype=torch.float64) for each in self.drawn_alone())
            which = torch.cartesian_prod(*[torch.arange(len(values))] * dimensions).view(-1, dimensions)
            weights, chance = values[which], chances[which].prod(1)
        count = weights.abs().sum(1)
        if self.function == "halfspace":
            thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
            return (
                weights.repeat_interleave(len(thresholds), 0),
                thresholds.repeat(len(weights)),
                (chance / chance.sum()).repeat_interleave(len(thresholds)) / len(thresholds),
            )
        threshold = {"conjunction": count - 0.5, "disjunction": 0.5 - count, "parity": count}[self.function]
        return weights, threshold, chance / chance.sum()

    def replay(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        """The chance at each example, from those before, that the function is true, and false, [B, n, k] each (times
        a number for each example); zero where no function fits."""
        weights, thresholds, chances = self.functions(xs.shape[-1])
        weights, thresholds = weights.to(xs.device, torch.float32), thresholds.to(xs.device, torch.float32)
        rows = max(1, 2**22 // len(weights))  # prompts at once, to bound the memory
        outputs = []
        for output in range(ys.shape[2]):
            parts = [
                self._masses(x, y, weights, thresholds, chances.to(xs.device, torch.float32))
                for x, y in zip(xs.float().split(rows), ys[..., output].split(rows), strict=True)
            ]
            outputs.append(torch.cat(parts))
        both = torch.stack(outputs, 3)  # [B, n, 2, k]
        return both[:, :, 0], both[:, :, 1]

    def _masses(self, xs: Tensor, ys: Tensor, weights: Tensor, thresholds: Tensor, chances: Tensor) -> Tensor:
        """[B, n, 2]: of the functions that are true and false at each example."""
        mass = chances.repeat(len(xs), 1)  # float32 numbers, but all sums are taken in float64
        count = weights.abs().sum(1)
        masses = []
        for x, y in zip(xs.unbind(1), (ys > 0).unbind(1), strict=True):
            if self.function == "parity":
                true = ((x > 0).float() @ weights.abs().T) % 2 == 1
            else:
                true = x @ weights.T > thresholds
            if self.planted:  # how much likelier each function makes this input, over an even draw
                rare = true if self.function == "conjunction" else ~true
                mass *= torch.where(rare, 1 - self.planted + self.planted * 2**count, 1 - self.planted)
            yes, total = (mass * true).sum(1, dtype=torch.float64), mass.sum(1, dtype=torch.float64)
            masses.append(torch.stack([yes, total - yes], 1))
            fits = true == y.unsqueeze(1)
            mass *= fits if not self.noise else torch.where(fits, 1 - self.noise, self.noise)
            mass /= mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
        return torch.stack(masses, 1)

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        yes, no = self.replay(xs, ys)
        return _logit((1 - self.noise) * yes + self.noise * no, (1 - self.noise) * no + self.noise * yes)


@register(
    "learner", "halving", family="boolean", papers=("2310.03016",), cases=({"function": "parity", "relevant": 2},)
)
@dataclass(frozen=True)
class Halving(LabelLearner):
    """The halving algorithm: the majority of the functions that fit, each counted once (Angluin, 1988; Littlestone).

    It makes at most log2 of the number of functions mistakes, whichever of them is true.

    function: conjunction, disjunction, halfspace or parity, as in version_space.
    relevant: variables with w = 1; None for all variables drawn alone.
    values: of each w, where they are drawn alone; None as in version_space.
    thresholds: of half-spaces.
    most: functions that are enumerated at most.
    """

    function: ClassName = "conjunction"
    relevant: PositiveInt | None = None
    values: tuple[int, ...] | None = None
    thresholds: tuple[float, ...] = (0.5,)
    most: PositiveInt = MOST_FUNCTIONS

    def decide(self, xs: Tensor, ys: Tensor) -> Tensor:
        space = VersionSpace(self.function, self.relevant, self.values, thresholds=self.thresholds, most=self.most)
        even = (1.0,) * len(space.drawn_alone()[0])
        space = VersionSpace(self.function, self.relevant, self.values, even, self.thresholds, most=self.most)
        yes, no = space.replay(xs, ys)
        return (yes - no).masked_fill((yes - no).abs() < 1e-9, 0).sign()  # rounding is no majority


@register(
    "learner",
    "sampled_formulas",
    family="boolean",
    papers=("2310.03016",),
    cases=({"dimensions": 4, "draws": 256}, {"dimensions": 3, "draws": 64, "disjunction": True, "negative": 0.0}),
)
@dataclass(frozen=True)
class SampledFormulas(RegressionLearner):
    """The posterior over formulas drawn from the prior, where the class is too large to enumerate and inputs are few.

    A fixed sample of formulas is weighted by what the examples say of each: by the chance of its labels and, as inputs
    were made to satisfy its terms, of its inputs. The more draws, the closer to Bayes-optimal.

    dimensions: bits of an input; all 2^dimensions inputs are tabled.
    terms: of each formula.
    positive: chance that a variable is in a term. negative: chance that its negation is.
    planted: share of inputs that were made to satisfy one term, the same in the whole prompt; others are even.
    noise: chance that a label is turned.
    slip: least chance that a label differs from a drawn formula's, as the true one may not be among them.
    disjunction: clauses of a CNF instead of terms of a DNF, all signs turned.
    draws: number of formulas. seed: of the draws.
    """

    dimensions: Annotated[int, Field(ge=1, le=10)]
    terms: PositiveInt = 3
    positive: Share = 0.1
    negative: Share = 0.1
    planted: Share = 0.35
    noise: Flip = 0.0
    slip: Flip = 0.02
    disjunction: bool = False
    draws: Annotated[int, Field(ge=1, le=MOST_FUNCTIONS)] = 2**13
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not max(self.noise, self.slip):
            raise InputError("slip is 0, as noise is: a label that no formula drawn gives would leave none; use 0.02")

    def predict(self, xs: Tensor, ys: Tensor) -> Tensor:
        if xs.shape[2] != self.dimensions:
            raise InputError(f"sampled_formulas is for {self.dimensions} bits, the prompt has {xs.shape[2]}")
        sign = -1 if self.disjunction else 1
        places = ((sign * xs > 0) * 2 ** torch.arange(self.dimensions, device=xs.device)).sum(2)
        holds, inputs = self._tables(xs)
        turned = max(self.noise, self.slip)
        told = torch.where(holds, math.log(1 - turned), math.log(turned)).to(inputs)
        untold = torch.where(holds, math.log(turned), math.log(1 - turned)).to(inputs)
        joint = torch.stack((inputs + untold, inputs + told))  # of input and label: [2, 2^d, N]
        step = max(1, 2**24 // (xs.shape[1] * self.draws))
        answers = []
        for at, label in zip(places.split(step), (sign * ys[..., 0] > 0).long().split(step), strict=True):
            weight = before(joint[label, at]) + inputs[at]
            answers.append((weight.softmax(-1) * holds[at]).sum(-1))
        yes = torch.cat(answers)[..., None].double()
        yes = yes * (1 - self.noise) + (1 - yes) * self.noise
        return sign * _logit(yes, 1 - yes)

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of every input and formula whether it holds, [2^d, N] bool, and the log chance of the input."""
        generator = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand(self.draws, self.terms, self.dimensions, generator=generator)
        terms = (uniform < self.positive).float()
        terms -= ((uniform >= self.positive) & (uniform < self.positive + self.negative)).float()
        every = torch.arange(2**self.dimensions)[:, None] >> torch.arange(self.dimensions)
        sizes = terms.abs().sum(2)
        meets = ((every & 1).float() * 2 - 1) @ terms.flatten(0, 1).T >= sizes.flatten()
        meets = meets.unflatten(1, sizes.shape)  # [2^d, N, terms]
        # Terms are drawn alike, so the one that inputs were made to satisfy is the first: 2^-(free bits) each.
        made = meets[..., 0] * 2.0 ** (sizes[:, 0] - self.dimensions)
        chance = (1 - self.planted) * 2.0**-self.dimensions + self.planted * made
        return meets.any(2).to(like.device), chance.log().to(like.device)


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

    Each example is an exact update of the variables' probabilities to be absent, plain or negated; only what the
    update makes dependent is forgotten. Close to Bayes-optimal where a version space is too large to enumerate.

    positive: chance that a variable is in the conjunction.
    negative: chance that its negation is.
    planted: share of inputs that were made to satisfy the conjunction; others are even.
    noise: chance that a label is turned.
    slip: chance that the label is positive for other reasons, such as another term, where the conjunction fails.
    disjunction: learn a disjunction, all signs turned.
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
        return _logit(yes.sum(1, keepdim=True), no.sum(1, keepdim=True)), torch.where(possible.unsqueeze(2), mixed, q)


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

    Each example is an exact update of the mean and the covariance of Gaussian weights; then they are taken to be
    Gaussian again. For where a version space is too large to enumerate; it does not use that weights are whole
    numbers.

    mean: of each weight, before.
    variance: of each weight, before.
    threshold: mean of t in w . x > t.
    threshold_variance: of t.
    noise: chance that a label is turned.
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
            answers.append(_logit(_probit(margin, self.noise)[0], _probit(-margin, self.noise)[0]))
            _, slope, bend = _probit(y * margin, self.noise)
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
    is taken to be Gaussian. Near the optimum for many variables with even, independent inputs; nothing is promised
    for others.

    values: of each weight.
    chances: of the values.
    thresholds: t in w . x > t, equally likely.
    noise: chance that a label is turned.
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
            _, slope, bend = _probit(z, self.noise)
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
        return _logit(_probit(margin, self.noise)[0], _probit(-margin, self.noise)[0])


def _among(values: Tensor, weights: Tensor, centre: Tensor, precision: Tensor | int) -> tuple[Tensor, Tensor]:
    """Mean and variance of numbers among `values` with log-weights, seen as `centre` with a Gaussian error."""
    reach = values.abs().max() + 100  # beyond, the nearest value has all the weight in any case
    far = (values - centre.clamp(-reach, reach).unsqueeze(-1)).square()
    share = (weights - far * (precision.unsqueeze(-1) if isinstance(precision, Tensor) else precision) / 2).softmax(-1)
    mean = (share * values).sum(-1)
    return mean, (share * (values - mean.unsqueeze(-1)).square()).sum(-1)


def _probit(z: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """The chance that a label agrees with a standard Gaussian margin z, turned with chance `noise`; the slope of its
    logarithm, and how fast that falls."""
    z = z.clamp(min=-30)  # so that its density is above zero
    bell = (-z.square() / 2).exp()
    low = torch.special.erfcx(-z.clamp(max=0) / math.sqrt(2)) * bell / 2  # `ndtr` itself is 0 from -10 on
    chance = noise + (1 - 2 * noise) * torch.where(z < 0, low, torch.special.ndtr(z))
    slope = (1 - 2 * noise) * bell / math.sqrt(2 * math.pi) / chance
    return chance, slope, slope * (slope + z)
