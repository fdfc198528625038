"""Bandits: a data set of pulled arms and their rewards, the best arm as the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.bandits import (
    BestArmPosterior,
    GreedyArm,
    LowerConfidence,
    PosteriorMeanArm,
    ThompsonSampling,
    UpperConfidence,
)
from contextlab.learners.linear_bandits import LinearThompson, LinUCB
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.decisions import DecisionTask, Transitions

NOISELESS = 1e-3
"""Noise that the posteriors assume where rewards have none."""


@dataclass(frozen=True)
class ArmsTask(DecisionTask):
    """Base: bandits, whose problem is the mean reward of each arm, "means" [B, arms].

    horizon: pulls in the data set.
    arms: number of arms.
    noise: standard deviation of Gaussian rewards.
    """

    arms: PositiveInt = 5
    noise: NonNegativeFloat = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arms < 2:
            raise InputError(f"arms {self.arms} leave nothing to decide; at least 2")

    @property
    def actions(self) -> int:
        return self.arms

    @property
    def input_size(self) -> int:
        return self.arms + 1

    @property
    def assumed_noise(self) -> float:
        """The noise that the learners assume."""
        return max(self.noise, NOISELESS)

    def start(self, problem: dict[str, Tensor]) -> Tensor:
        """A bandit has the one state 0."""
        return torch.zeros(len(problem["means"]), dtype=torch.int64, device=problem["means"].device)

    def step(
        self, problem: dict[str, Tensor], state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Rewards of the arms pulled; the state stays."""
        mean = problem["means"].gather(1, action)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + self.noise * noise, state

    def best(self, problem: dict[str, Tensor], state: Tensor) -> Tensor:
        """The arm of the highest mean."""
        return problem["means"].argmax(1, keepdim=True).expand_as(state).contiguous()

    def lost(self, problem: dict[str, Tensor], state: Tensor, action: Tensor) -> Tensor:
        """The highest mean less that of the arm."""
        return problem["means"].amax(1, keepdim=True) - problem["means"].gather(1, action)

    def encode(self, query: Tensor, seen: Transitions | None) -> Tensor:
        """The arm pulled, one-hot, and its reward; zeros where nothing is shown."""
        if seen is None:
            return torch.zeros(*query.shape, self.input_size, device=query.device)
        return torch.cat([F.one_hot(seen.action, self.arms).to(seen.reward), seen.reward.unsqueeze(-1)], -1)

    def pull(
        self, problem: dict[str, Tensor], action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Transitions]:
        """The data set of given arms [B, horizon], pulled whatever their rewards were."""
        state = torch.zeros_like(action)
        reward, after = self.step(problem, state, action, generator)
        return F.pad(state, (1, 0)), Transitions(state, action, reward, after)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """A pull a line, and the means of the arms below."""
        assert prompt.hidden is not None
        lines = [
            f"arm {int(token[:-1].argmax())} -> {float(token[-1]): .2f}   [best: arm {int(target)}]"
            for token, target in zip(prompt.inputs[row, 1:], prompt.targets[row, 1:], strict=True)
        ]
        return "\n".join([*lines, "means " + " ".join(f"{m:.2f}" for m in prompt.hidden["means"][row].tolist())])


@register(
    "task",
    "bandit",
    family="decisions",
    papers=("2306.14892",),
    cases=({}, {"arms": 3, "horizon": 30, "rewards": "bernoulli"}, {"arms": 4, "horizon": 20, "data": "even"}),
)
@dataclass(frozen=True)
class Bandit(ArmsTask):
    """Multi-armed bandits: pulls of arms and their rewards, then the best arm (2306.14892).

    The mean of each arm is uniform on [0, 1]. The data set is pulled by a fixed distribution over the arms, drawn for
    each prompt: (1 - c) times a flat Dirichlet draw plus c at one random arm, c uniform over 0, 0.1, ..., 1. That is
    the generator of the paper's public code, which takes 500 pulls; here the prediction before any pull is scored too.

    horizon: pulls in the data set.
    arms: number of arms.
    noise: standard deviation of Gaussian rewards.
    rewards: "gaussian", the mean and noise; "bernoulli", 1 with the mean as its probability, else 0.
    data: "mixture", as above; "even", every arm with equal probability.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"arms": 3, "horizon": 50, "noise": 0.1},
        "hard": {"arms": 20, "horizon": 500, "noise": 0.5},
    }

    rewards: Literal["gaussian", "bernoulli"] = "gaussian"
    data: Literal["mixture", "even"] = "mixture"

    def problems(self, batch: int, generator: torch.Generator, device: torch.device | str) -> dict[str, Tensor]:
        """Means [B, arms], uniform on 0 to 1."""
        return {"means": torch.rand(batch, self.arms, generator=generator, device=device)}

    def explore(self, problem: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Transitions]:
        """Pulls of arms drawn independently."""
        means = problem["means"]
        batch, device = len(means), means.device
        if self.data == "even":
            shape = (batch, self.horizon)
            return self.pull(problem, torch.randint(self.arms, shape, generator=generator, device=device), generator)
        share = torch.rand(means.shape, generator=generator, device=device).log().neg()  # exponential
        share = share / share.sum(1, keepdim=True)  # flat Dirichlet
        one = F.one_hot(torch.randint(self.arms, (batch,), generator=generator, device=device), self.arms)
        weight = torch.randint(11, (batch, 1), generator=generator, device=device) / 10
        edges = ((1 - weight) * share + weight * one).cumsum(1)[:, :-1].contiguous()
        uniform = torch.rand(batch, self.horizon, generator=generator, device=device)
        return self.pull(problem, torch.searchsorted(edges, uniform, right=True), generator)

    def step(
        self, problem: dict[str, Tensor], state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Rewards of the arms pulled; the state stays."""
        if self.rewards == "gaussian":
            return super().step(problem, state, action, generator)
        mean = problem["means"].gather(1, action)
        return (torch.rand(mean.shape, generator=generator, device=mean.device) < mean).to(mean.dtype), state

    def learners(self) -> dict[str, Learner]:
        """The posterior mean, the Bayes-optimal choice from the data, first; then the usual algorithms."""
        arms, noise, rewards = self.arms, self.assumed_noise, self.rewards
        thompson = ThompsonSampling(arms, "beta") if rewards == "bernoulli" else ThompsonSampling(arms, noise=noise)
        return {
            "posterior_mean": PosteriorMeanArm(arms, rewards, noise),
            "posterior_sampling": BestArmPosterior(arms, rewards, noise),
            "thompson": thompson,
            "ucb1": UpperConfidence(arms),
            "lower_confidence": LowerConfidence(arms),
            "greedy": GreedyArm(arms),
            "greedy_tries_all": GreedyArm(arms, tries_all=True),
        }

    def splits(self) -> dict[str, Task]:
        """'train', other rewards, data that favour no arm, and twice the pulls."""
        found: dict[str, Task] = {"train": self}
        if self.rewards == "gaussian":
            found["no noise"] = self.replace(noise=0.0)
            found["more noise"] = self.replace(noise=2 * self.noise if self.noise else 0.5)
            found["bernoulli rewards"] = self.replace(rewards="bernoulli")
        if self.data == "mixture":
            found["even data"] = self.replace(data="even")
        return {**found, f"horizon={2 * self.horizon}": self.replace(horizon=2 * self.horizon)}

    def chance(self) -> Mapping[str, float]:
        """Any one arm: the largest of n uniform means is n / (n + 1) on average."""
        return {"suboptimality": self.arms / (self.arms + 1) - 0.5, "error_rate": 1 - 1 / self.arms}


@register(
    "task",
    "linear_bandit",
    family="decisions",
    papers=("2306.14892",),
    cases=({}, {"arms": 6, "dimensions": 3, "horizon": 30, "data": "even"}),
)
@dataclass(frozen=True)
class LinearBandit(ArmsTask):
    """Linear bandits: the means of the arms are products of one hidden vector with features that never change.

    The features of the arms are Gaussian of variance 1 / dimensions, the same in all prompts; the hidden vector of
    each prompt too. A model that knows the features learns of all arms from each pull (2306.14892). The data set is
    collected by Thompson sampling that takes the arms for independent, with the prior N(0, 1), as in the paper's
    public code, which takes 200 pulls; here the prediction before any pull is scored too.

    horizon: pulls in the data set.
    arms: number of arms.
    noise: standard deviation of the rewards.
    dimensions: of the features.
    feature_seed: of the features.
    data: "thompson", as above; "even", every arm with equal probability.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"arms": 6, "horizon": 50, "noise": 0.1},
        "hard": {"arms": 50, "dimensions": 8, "noise": 0.5},
    }

    arms: PositiveInt = 10
    dimensions: Annotated[int, Field(gt=0, le=torch.quasirandom.SobolEngine.MAXDIM)] = 2
    feature_seed: NonNegativeInt = 0
    data: Literal["thompson", "even"] = "thompson"

    @property
    def features(self) -> Tensor:
        """The arms' features, [arms, dimensions] float32."""
        return _features(self.arms, self.dimensions, self.feature_seed)

    def problems(self, batch: int, generator: torch.Generator, device: torch.device | str) -> dict[str, Tensor]:
        """Also the hidden vectors, "direction" [B, dimensions]."""
        direction = torch.randn(batch, self.dimensions, generator=generator, device=device) / self.dimensions**0.5
        return {"means": direction @ self.features.to(direction).T, "direction": direction}

    def explore(self, problem: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Transitions]:
        """Pulls by Thompson sampling, or of arms drawn uniformly."""
        means = problem["means"]
        batch, device = len(means), means.device
        if self.data == "even":
            shape = (batch, self.horizon)
            return self.pull(problem, torch.randint(self.arms, shape, generator=generator, device=device), generator)
        state = self.start(problem).unsqueeze(1)
        belief, spread = torch.zeros_like(means), torch.ones_like(means)
        actions, rewards = [], []
        for _ in range(self.horizon):
            drawn = torch.randn(means.shape, generator=generator, device=device)
            action = drawn.mul_(spread).add_(belief).max(1, keepdim=True).indices  # ten times faster than argmax
            reward, _ = self.step(problem, state, action, generator)
            old, variance = belief.gather(1, action), spread.gather(1, action).square()
            gain = variance / (variance + self.assumed_noise**2)
            belief.scatter_(1, action, old + gain * (reward - old))
            spread.scatter_(1, action, (variance * (1 - gain)).sqrt())
            actions.append(action)
            rewards.append(reward)
        action = torch.cat(actions, 1)
        state = torch.zeros_like(action)
        return F.pad(state, (1, 0)), Transitions(state, action, torch.cat(rewards, 1), state)

    def learners(self) -> dict[str, Learner]:
        """The posterior mean, the Bayes-optimal choice from the data, first; then the usual algorithms."""
        noise, variance = self.assumed_noise, 1 / self.dimensions
        return {
            "posterior_mean": LinUCB(self.features, strength=noise**2 / variance, width=0.0),
            "posterior_sampling": LinearThompson(self.features, prior_variance=variance, noise=noise),
            "linucb": LinUCB(self.features),
            "thompson": ThompsonSampling(self.arms, prior_mean=0.0, prior_variance=1.0, noise=noise),
            "ucb1": UpperConfidence(self.arms),
            "greedy": GreedyArm(self.arms),
        }

    def splits(self) -> dict[str, Task]:
        """'train', other noise, other data, features that are new, and twice the pulls."""
        return {
            "train": self,
            "more noise": self.replace(noise=2 * self.noise if self.noise else 0.5),
            "even data" if self.data == "thompson" else "thompson data": self.replace(
                data="even" if self.data == "thompson" else "thompson"
            ),
            "new features": self.replace(feature_seed=self.feature_seed + 1),
            f"horizon={2 * self.horizon}": self.replace(horizon=2 * self.horizon),
        }

    def chance(self) -> Mapping[str, float]:
        """Any arm, evenly: it loses the expected highest mean, here over 2^16 quasi-random hidden vectors."""
        return {
            "suboptimality": _highest(self.arms, self.dimensions, self.feature_seed),
            "error_rate": 1 - 1 / self.arms,
        }


@lru_cache(maxsize=32)
def _features(arms: int, dimensions: int, seed: int) -> Tensor:
    """Drawn on the CPU so that they do not depend on the device."""
    return torch.randn(arms, dimensions, generator=torch.Generator().manual_seed(seed)) / dimensions**0.5


@lru_cache(maxsize=32)
def _highest(arms: int, dimensions: int, seed: int) -> float:
    """What the best arm has over the mean of all, on average: the means have mean 0."""
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(2**16, dtype=torch.float64)
    direction = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)) / dimensions**0.5
    return (direction @ _features(arms, dimensions, seed).double().T).amax(1).mean().item()
