"""Learners that choose: bandit algorithms and posteriors, batched over prompts and over all prefixes.

What a bandit algorithm knows of a prefix are the pulls of each arm and the sum of its rewards, two running sums. A
prediction is the log-probability with which the algorithm takes each arm next: near one for the arm of the highest
index (shared where indices tie), or the exact probability with which a randomised algorithm takes it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

MOST_CELLS = 2**20
"""Numbers in the largest table that a learner makes at once; more prefixes are answered in turns."""


class DecisionLearner(Learner):
    """Base: a learner that chooses actions, for all prefixes of a prompt or for the whole of it."""

    @abstractmethod
    def last(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, actions] after the whole prompt: the last position of what a call gives."""


class ArmLearner(DecisionLearner):
    """Base: a learner of bandits. It sums up the pulls; subclasses answer from the sums."""

    cells: int = 1
    """Numbers that it makes for each prefix and arm."""

    @property
    @abstractmethod
    def pulled(self) -> int:
        """Number of arms."""

    @abstractmethod
    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        """Log-probabilities [N, arms] from the pulls and the summed rewards of each arm, both [N, arms] float64."""

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, arms], float32. Raises InputError for prompts of another task."""
        one, reward = self._pulls(prompt)
        return self._choose(one.cumsum(1), (one * reward).cumsum(1))

    def last(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, arms] after the whole prompt, float32."""
        one, reward = self._pulls(prompt)
        return self._choose(one.sum(1), (one * reward).sum(1))

    def _pulls(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Arms one-hot [B, T, arms], zero where none is shown, and rewards [B, T, 1]; float64."""
        inputs = prompt.inputs
        if inputs.ndim != 3 or inputs.shape[-1] != self.pulled + 1:
            raise InputError(
                f"{type(self).__name__} has {self.pulled} arms: it needs inputs [B, T, {self.pulled + 1}], such as a "
                f"bandit of {self.pulled} arms draws; got {list(inputs.shape)}"
            )
        return inputs[..., :-1].double(), inputs[..., -1:].double()

    def _choose(self, count: Tensor, total: Tensor) -> Tensor:
        turn = max(1, MOST_CELLS // (self.pulled * self.cells))
        both = zip(count.flatten(0, -2).split(turn), total.flatten(0, -2).split(turn), strict=True)
        return torch.cat([self.choose(*each).float() for each in both]).view(count.shape)


def certain(index: Tensor) -> Tensor:
    """Log-probabilities of the choice of the highest index [..., arms]; arms that tie share it."""
    top = (index == index.amax(-1, keepdim=True)).to(index.dtype)
    return ((1 - SMOOTHING) * top / top.sum(-1, keepdim=True) + SMOOTHING / index.shape[-1]).log()


def means(count: Tensor, total: Tensor) -> Tensor:
    """Mean reward [..., arms]; 0 for an arm that was not tried. count, total: tries and their rewards, [..., arms]."""
    return total / count.clamp(min=1)


def probability_of_best(mass: Tensor, below: Tensor) -> Tensor:
    """The probability that each of some independent values is the largest, [N, arms].

    mass: [N, arms, cells], the probability that the value lies in each cell. below: that it lies in
    an earlier one, and half of `mass`.
    """
    columns = below.unbind(1)
    earlier = [torch.ones_like(columns[0])]
    for column in columns[:-1]:
        earlier.append(earlier[-1] * column)
    later, won = torch.ones_like(columns[0]), list[Tensor]()
    for k in reversed(range(len(columns))):
        won.append((mass[:, k] * earlier[k] * later).sum(-1))
        later = later * columns[k]
    best = torch.stack(won[::-1], -1)
    best = best / best.sum(-1, keepdim=True)
    return (1 - SMOOTHING) * best + SMOOTHING / best.shape[-1]


@register(
    "learner",
    "greedy_arm",
    family="decisions",
    papers=("2306.14892",),
    cases=({"arms": 5}, {"arms": 5, "tries_all": True}),
)
@dataclass(frozen=True)
class GreedyArm(ArmLearner):
    """The arm of the highest mean reward.

    arms: number of arms.
    tries_all: arms that were not tried come first; else their mean counts as 0.
    """

    arms: PositiveInt
    tries_all: bool = False

    @property
    def pulled(self) -> int:
        return self.arms

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        mean = means(count, total)
        return certain(mean.masked_fill(count == 0, math.inf) if self.tries_all else mean)


@register(
    "learner", "ucb1", family="decisions", papers=("2306.14892",), cases=({"arms": 5}, {"arms": 5, "bonus": "constant"})
)
@dataclass(frozen=True)
class UpperConfidence(ArmLearner):
    """The arm of the highest mean reward plus a bonus for few pulls; arms that were not tried come first.

    arms: number of arms.
    width: factor of the bonus.
    bonus: after t pulls, n of them of the arm, "log" is sqrt(2 log t / n) (UCB1, Auer et al., 2002), "constant" is
        sqrt(1 / n), as in the public code of 2306.14892.
    """

    arms: PositiveInt
    width: PositiveFloat = 1.0
    bonus: Literal["log", "constant"] = "log"

    @property
    def pulled(self) -> int:
        return self.arms

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        grown = 2 * count.sum(-1, keepdim=True).clamp(min=1).log() if self.bonus == "log" else 1.0
        index = means(count, total) + self.width * (grown / count.clamp(min=1)).sqrt()
        return certain(index.masked_fill(count == 0, math.inf))


@register("learner", "lower_confidence", family="decisions", papers=("2306.14892",), cases=({"arms": 5},))
@dataclass(frozen=True)
class LowerConfidence(ArmLearner):
    """Lower confidence bound, for offline data: the arm of the highest mean reward less width / sqrt(pulls).

    An arm that was not tried counts as one pull of reward 0, as in the public code of 2306.14892.

    arms: number of arms.
    width: factor of the penalty.
    """

    arms: PositiveInt
    width: PositiveFloat = 0.8

    @property
    def pulled(self) -> int:
        return self.arms

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        return certain(means(count, total) - self.width * count.clamp(min=1).rsqrt())


@register(
    "learner",
    "thompson_sampling",
    family="decisions",
    papers=("2306.14892",),
    cases=({"arms": 5}, {"arms": 5, "prior": "beta"}),
)
@dataclass(frozen=True)
class ThompsonSampling(ArmLearner):
    """Thompson sampling for independent arms: the probability that each arm's draw from its posterior is the largest.

    Computed by quadrature, not drawn: to about 0.005 where the posteriors are no narrower than a cell. Sampling an
    action from the prediction is Thompson sampling.

    arms: number of arms.
    prior: of each mean: "gaussian", with Gaussian rewards; "beta", uniform on [0, 1], with rewards in [0, 1].
    prior_mean: of the Gaussian.
    prior_variance: of the Gaussian.
    noise: assumed standard deviation of Gaussian rewards.
    grid: cells of the quadrature.
    """

    arms: PositiveInt
    prior: Literal["gaussian", "beta"] = "gaussian"
    prior_mean: float = 0.5
    prior_variance: PositiveFloat = 1 / 12
    noise: PositiveFloat = 0.3
    grid: PositiveInt = 128

    @property
    def pulled(self) -> int:
        return self.arms

    @property
    def cells(self) -> int:  # type: ignore[override]
        return self.grid

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        if self.prior == "beta":
            if bool(((total < 0) | (total > count)).any()):
                raise InputError("thompson_sampling: the beta prior needs rewards in [0, 1]; use prior 'gaussian'")
            return _best_on_unit(count, total, "bernoulli", 1.0, self.grid).log()
        precision = 1 / self.prior_variance + count / self.noise**2
        mean = (self.prior_mean / self.prior_variance + total / self.noise**2) / precision
        spread = precision.rsqrt()
        # The largest value lies between the largest low end and the largest high end.
        low = (mean - 6 * spread).amax(-1, keepdim=True)
        high = (mean + 6 * spread).amax(-1, keepdim=True)
        step = torch.linspace(0, 1, self.grid + 1, dtype=mean.dtype, device=mean.device)
        edge = (low + (high - low) * step).unsqueeze(-2)
        # float32 is exact enough for probabilities, and five times faster
        cdf = torch.special.ndtr(((edge - mean.unsqueeze(-1)) / spread.unsqueeze(-1)).float())
        return probability_of_best(cdf.diff(dim=-1), (cdf[..., 1:] + cdf[..., :-1]) / 2).log()


@register(
    "learner",
    "posterior_mean_arm",
    family="decisions",
    papers=("2306.14892",),
    cases=({"arms": 5}, {"arms": 5, "rewards": "bernoulli"}),
)
@dataclass(frozen=True)
class PosteriorMeanArm(ArmLearner):
    """The arm of the highest posterior mean, for independent means that are uniform on [0, 1].

    Bayes-optimal for one choice from given data: no other choice has a smaller expected loss.

    arms: number of arms.
    rewards: "gaussian" or "bernoulli".
    noise: standard deviation of Gaussian rewards.
    """

    arms: PositiveInt
    rewards: Literal["gaussian", "bernoulli"] = "gaussian"
    noise: PositiveFloat = 0.3

    @property
    def pulled(self) -> int:
        return self.arms

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        return certain(self.mean(count, total))

    def mean(self, count: Tensor, total: Tensor) -> Tensor:
        """The posterior means, of the shape of `count`."""
        if self.rewards == "bernoulli":
            return (total + 1) / (count + 2)
        # A Gaussian of the mean reward, cut to [0, 1]; mirrored where it leans to the left, for the tails' accuracy.
        spread = self.noise * count.clamp(min=1).rsqrt()
        centre = means(count, total)
        flip = centre < 0.5
        centre = torch.where(flip, 1 - centre, centre)
        low, high = -centre / spread, (1 - centre) / spread
        log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
        log_mass = log_high + torch.log1p(-(log_low - log_high).exp())

        def density(z: Tensor) -> Tensor:
            return (-z.square() / 2 - math.log(2 * math.pi) / 2 - log_mass).exp()

        mean = (centre + spread * (density(low) - density(high))).clamp(0, 1)
        return torch.where(count == 0, 0.5, torch.where(flip, 1 - mean, mean))


@register(
    "learner",
    "best_arm_posterior",
    family="decisions",
    papers=("2306.14892",),
    cases=({"arms": 5}, {"arms": 5, "rewards": "bernoulli"}),
)
@dataclass(frozen=True)
class BestArmPosterior(ArmLearner):
    """The posterior probability that each arm is the best, for independent means that are uniform on [0, 1].

    What decision pre-training aims at: no prediction of the best arm has a smaller cross-entropy, and sampling from it
    is posterior sampling (2306.14892). Exact up to a quadrature on `grid` cells of [0, 1].

    arms: number of arms.
    rewards: "gaussian" or "bernoulli".
    noise: standard deviation of Gaussian rewards.
    grid: cells of the quadrature.
    """

    arms: PositiveInt
    rewards: Literal["gaussian", "bernoulli"] = "gaussian"
    noise: PositiveFloat = 0.3
    grid: PositiveInt = 128

    @property
    def pulled(self) -> int:
        return self.arms

    @property
    def cells(self) -> int:  # type: ignore[override]
        return self.grid

    def choose(self, count: Tensor, total: Tensor) -> Tensor:
        return _best_on_unit(count, total, self.rewards, self.noise, self.grid).log()


def _best_on_unit(count: Tensor, total: Tensor, rewards: str, noise: float, grid: int) -> Tensor:
    """Probability that each arm is the best, [N, arms], for means uniform on [0, 1] before the pulls."""
    at = (torch.arange(grid, device=count.device) + 0.5) / grid
    if rewards == "bernoulli":
        log_density = total.float().unsqueeze(-1) * at.log() + (count - total).float().unsqueeze(-1) * (-at).log1p()
    else:
        # in this form nothing cancels, so that float32 is exact enough; it is several times faster
        weight = (count / (-2 * noise**2)).float().unsqueeze(-1)
        log_density = weight * (at - means(count, total).float().unsqueeze(-1)).square()
    mass = log_density.softmax(-1)
    return probability_of_best(mass, mass.cumsum(-1) - mass / 2)
