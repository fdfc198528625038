"""Problems whose solution is composed step by step, in tokens: what such tasks share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt
from contextlab.tasks.base import TokenTask

Part = Literal["train", "test"]


@dataclass(frozen=True)
class SolvedTask(TokenTask):
    """Base: a problem and its solution in one row of tokens, the solution fed back as it is predicted.

    Subclasses write the problems and solve them; everything else follows. A token of the solution is predicted at
    the position before it.
    """

    @abstractmethod
    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Problems [batch, P] int64."""

    @abstractmethod
    def solve(self, problems: Tensor) -> Tensor:
        """The solution [B, S] of problems [B, P]."""

    @abstractmethod
    def depth(self) -> Tensor:
        """Depth of each token of the solution in the computation graph, [S]; what needs the problem only has 1."""

    @property
    @abstractmethod
    def problem(self) -> int:
        """P, tokens in a problem."""

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw problems with their solutions, [batch, P + S - 1] tokens."""
        tokens = self.write(batch, generator, device)
        tokens = torch.cat([tokens, self.solve(tokens)], 1)
        shape = tokens[:, 1:].shape
        scored = (torch.arange(shape[1], device=tokens.device) >= self.problem - 1).expand(shape).clone()
        return Prompt(tokens[:, :-1], tokens[:, 1:], scored, torch.zeros_like(tokens[:, 1:]))

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """Also solved: 1 at every token of a prompt whose whole solution is right, each token given those before."""
        return with_solved(super().errors(prediction, prompt), prompt)

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "depth": of the token in the computation graph, so that partly right solutions show how far they go."""
        depth = F.pad(self.depth().to(prompt.inputs.device), (self.problem - 1, 0))
        return {**super().facets(prompt), "depth": depth.expand(prompt.batch, -1)}

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, which solves the problem exactly."""
        return {"evaluator": Program(self._answers, self.input_size)}

    def _answers(self, tokens: Tensor) -> Tensor:
        """The solution's tokens, each at the position before it; 0 before the problem is known."""
        solution = self.solve(tokens[:, : self.problem])
        return F.pad(solution, (self.problem - 1, 0))


def with_solved(found: dict[str, Tensor], prompt: Prompt) -> dict[str, Tensor]:
    """A task's errors [B, T] and "solved" [B, T]: 1 at every token of a prompt of which all scored tokens are right."""
    right = (found["accuracy"] == 1) | ~prompt.scored
    return {**found, "solved": right.all(1, keepdim=True).float().expand_as(right)}


def kept(rest: Tensor, base: int, generator: torch.Generator, part: Part) -> Tensor:
    """The last digit [B] of problems, 0 .. base - 1, such that the sum of the digits puts them in the task's part.

    rest: the sum of the problem's other digits, [B]. Problems whose digits sum to `base - 1` modulo `base` are the
    test part; within a part, all problems are equally likely.
    """
    classes = torch.randint(base - 1, rest.shape, generator=generator, device=rest.device)
    if part == "test":
        classes = torch.full_like(classes, base - 1)
    return (classes - rest) % base
