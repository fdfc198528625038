"""The posterior over the mixture of tasks whose examples stand in one prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.base import before
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

SLOTS = 4
"""Tokens of an example: a, b, "=", the answer."""


@register("learner", "superposition_posterior", family="recall", papers=("2410.05603",), cases=())
@dataclass(frozen=True, eq=False)
class SuperpositionPosterior(Learner):
    """The probability of each task's answer, from the tasks of the examples before: exact for superposition prompts.

    Where each example shows its task (no two tasks give its answer) and the prompt's mixture is drawn from a symmetric
    Dirichlet distribution, the next example is of a task with probability (concentration + its examples so far) / (all
    of that). At concentration 0, of prompts with one task each, these are the tasks' shares in the context.

    answers: of each task to each pair of numbers, [tasks, numbers, numbers] int64.
    concentration: of the Dirichlet distribution.
    proportions: the mixture itself, where it is known; then the examples tell nothing.
    """

    answers: Tensor
    concentration: NonNegativeFloat = 1.0
    proportions: tuple[float, ...] | None = None

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, numbers + 1], float32; uniform where no answer is asked for."""
        tasks, numbers, _ = self.answers.shape
        tokens = prompt.inputs
        if tokens.is_floating_point() or tokens.shape[1] % SLOTS or int(tokens.max()) > numbers:
            raise InputError(f"superposition_posterior needs prompts of examples `a b = c` of {numbers} numbers")
        first, second, _, shown = tokens.unflatten(1, (-1, SLOTS)).unbind(2)
        answers = self.answers.to(tokens.device)[:, first.clamp_max(numbers - 1), second.clamp_max(numbers - 1)]
        answers = answers.movedim(0, 2)  # [B, n, K]
        if self.proportions is None:
            counts = before((answers == shown.unsqueeze(2)).double()) + self.concentration
            total = counts.sum(2, keepdim=True)
            share = torch.where(total > 0, counts / total, 1 / tasks)
        else:
            share = torch.tensor(self.proportions, dtype=torch.float64, device=tokens.device).expand_as(answers)
        size = numbers + 1
        chances = torch.full((*shown.shape, size), SMOOTHING / size, dtype=torch.float64, device=tokens.device)
        chances.scatter_add_(2, answers, (1 - SMOOTHING) * share)
        found = torch.full((*shown.shape, SLOTS, size), -math.log(size), device=tokens.device)
        found[:, :, 2] = chances.log().float()
        return found.flatten(1, 2)
