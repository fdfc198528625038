"""The base of decision tasks: a data set of transitions in the context, the optimal action as the answer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.prompt import Prompt, Task, wide
from contextlab.tasks.base import check_options


@dataclass
class Transitions:
    """What happened: in `state` the `action` was taken, `reward` came and the state became `after`; each [B, n]."""

    state: Tensor
    action: Tensor
    reward: Tensor
    after: Tensor


@dataclass(frozen=True)
class DecisionTask(Task):
    """Base: decision pre-training (2306.14892). Token t shows transition t and asks for the best action in a state.

    The prompt has horizon + 1 tokens; the first shows no transition. Position t has seen t transitions. A prediction
    is the logits of the actions; it is trained by cross-entropy to the optimal action and judged by what its likeliest
    action loses. `contextlab.evaluation.decisions` plays the same problems online.

    A problem is a dict of tensors [B, ...], which the prompt hides; states and actions are numbers from 0.

    horizon: transitions in the data set.
    """

    metric: ClassVar[str] = "suboptimality"

    horizon: PositiveInt = 100

    def __post_init__(self) -> None:
        check_options(self)

    @property
    @abstractmethod
    def actions(self) -> int:
        """Number of actions."""

    @property
    def output_size(self) -> int:
        return self.actions

    @abstractmethod
    def problems(self, batch: int, generator: torch.Generator, device: torch.device | str) -> dict[str, Tensor]:
        """Draw what the prompts' data come from: tensors [B, ...] by name."""

    @abstractmethod
    def explore(self, problem: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Transitions]:
        """The states asked about [B, horizon + 1], and the data set [B, horizon]."""

    @abstractmethod
    def start(self, problem: dict[str, Tensor]) -> Tensor:
        """The state [B] in which an episode begins."""

    @abstractmethod
    def step(
        self, problem: dict[str, Tensor], state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Rewards and next states [B, n] of actions [B, n] taken in states [B, n]."""

    @abstractmethod
    def best(self, problem: dict[str, Tensor], state: Tensor) -> Tensor:
        """The action that a predictor should name in states [B, n]; [B, n]."""

    @abstractmethod
    def lost(self, problem: dict[str, Tensor], state: Tensor, action: Tensor) -> Tensor:
        """Expected reward that actions [B, n] in states [B, n] lose against the best ones, [B, n]."""

    @abstractmethod
    def encode(self, query: Tensor, seen: Transitions | None) -> Tensor:
        """Tokens [B, n, input_size] that show transitions and ask about the states query [B, n]."""

    @property
    def episode(self) -> int | None:
        """Steps after which an online agent is put back to the start; None for never."""
        return None

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs [B, horizon + 1, input_size], targets [B, horizon + 1] int64, all scored."""
        problem = self.problems(batch, generator, device)
        query, seen = self.explore(problem, generator)
        inputs = torch.cat([self.encode(query[:, :1], None), self.encode(query[:, 1:], seen)], 1)
        return Prompt(
            inputs,
            self.best(problem, query),
            torch.ones_like(query, dtype=torch.bool),
            torch.arange(self.horizon + 1, device=query.device).expand(batch, -1),
            hidden={**problem, "query": query},
        )

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross-entropy to the optimal action in nats. prediction: logits [B, T, actions]."""
        return F.cross_entropy(wide(prediction).transpose(1, 2), prompt.targets)

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """suboptimality and error_rate of the likeliest action, and cross_entropy to the optimal one, [B, T]."""
        assert prompt.hidden is not None
        action = prediction.argmax(-1)
        return {
            "suboptimality": self.lost(prompt.hidden, prompt.hidden["query"], action),
            "error_rate": (action != prompt.targets).float(),
            "cross_entropy": F.cross_entropy(wide(prediction).transpose(1, 2), prompt.targets, reduction="none"),
        }
