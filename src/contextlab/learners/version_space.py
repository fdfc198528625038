"""Bayes' rule over a class of Boolean functions: all of them, or a sample where they are too many to list."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.base import RegressionLearner, before
from contextlab.learners.boolean import Flip, LabelLearner, Share, log_odds
from contextlab.registry import register

MOST_FUNCTIONS = 2**15
"""Functions that a version space enumerates at most; its memory and time grow with their number."""

ClassName = Literal["conjunction", "disjunction", "halfspace", "parity"]

_USUAL: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "conjunction": ((0, 1, -1), (0.7, 0.15, 0.15)),
    "disjunction": ((0, 1, -1), (0.7, 0.15, 0.15)),
    "halfspace": ((0, 1), (0.7, 0.3)),
    "parity": ((0, 1), (0.5, 0.5)),
}


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
    `relevant` variables, chosen uniformly, and 0 for the others. A conjunction is +1 where each x_v with w_v != 0 has
    its sign, a disjunction where any has; a half-space where w . x > t; a parity where the number of x_v = +1 with
    w_v != 0 is odd.

    function: conjunction, disjunction, halfspace or parity.
    relevant: variables with w = 1; None for all variables drawn alone.
    values: of each w, where they are drawn alone; None for 0, 1, -1 (conjunction, disjunction) and 0, 1 (others).
    chances: of the values; None for even ones where `values` are given, else for those of the task `boolean`: 0.7,
        0.15, 0.15 (conjunction, disjunction), 0.7, 0.3 (halfspace), 0.5, 0.5 (parity).
    thresholds: of half-spaces, t, equally likely.
    planted: share of inputs that were made to satisfy the conjunction (falsify the disjunction); others are uniform.
        It matters as such an input tells something about the function before its label does.
    noise: probability that a label is flipped.
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
        return log_odds((1 - self.noise) * yes + self.noise * no, (1 - self.noise) * no + self.noise * yes)


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
    positive: probability that a variable is in a term. negative: probability that its negation is.
    planted: share of inputs that were made to satisfy one term, the same in the whole prompt; others are uniform.
    noise: probability that a label is flipped.
    slip: least probability that a label differs from a drawn formula's, as the true one may not be among them.
    disjunction: clauses of a CNF instead of terms of a DNF, all signs flipped.
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
        return sign * log_odds(yes, 1 - yes)

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
