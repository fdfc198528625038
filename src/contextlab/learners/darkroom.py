"""The dark room: its moves, what they lose, and the learner that keeps every goal that agrees with what was seen.

A cell is x * size + y. Actions: 0 is x + 1, 1 is x - 1, 2 is y + 1, 3 is y - 1, 4 stays; a move into a wall stays
where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.bandits import DecisionLearner, certain
from contextlab.prompt import Prompt
from contextlab.registry import register

ACTIONS = 5
MOST_CELLS = 2**22
"""Numbers in the largest table that the learner makes at once; more prefixes are answered in turns."""


@lru_cache(maxsize=16)
def moves(size: int) -> Tensor:
    """The cell in which each action ends, from each cell: [cells, 5]."""
    cell = torch.arange(size**2)
    by = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])
    place = torch.stack([cell // size, cell % size], 1)
    after = (place.unsqueeze(1) + by).clamp(0, size - 1)
    return after[..., 0] * size + after[..., 1]


def moved(cell: Tensor, action: Tensor, size: int) -> Tensor:
    """The cells in which actions end. cell, action: int64 of the same shape, which the answer has."""
    return moves(size).to(cell.device).take(cell * ACTIONS + action)


def distance(cell: Tensor, goal: Tensor, size: int) -> Tensor:
    """Moves from one cell to another: int64, of their shape. cell, goal: int64 that broadcast."""
    rows = cell.div(size, rounding_mode="floor") - goal.div(size, rounding_mode="floor")
    return rows.abs() + (cell % size - goal % size).abs()


@lru_cache(maxsize=16)
def tables(size: int) -> tuple[Tensor, Tensor]:
    """For each cell and goal the action that 2306.14892 calls optimal, [cells, cells], and what actions lose.

    The optimal action brings x to the goal's, then y, then stays. The loss [cells, cells, 5] is in steps without
    reward against the best action, optimal actions following; reward is 1 for every step that ends at the goal.
    """
    cell = torch.arange(size**2)
    here, goal = cell[:, None], cell[None, :]
    x, y = here // size - goal // size, here % size - goal % size
    best = torch.where(x < 0, 0, torch.where(x > 0, 1, torch.where(y < 0, 2, torch.where(y > 0, 3, 4))))
    left = distance(moves(size)[:, None, :], goal[..., None], size)
    least = (distance(here, goal, size) - 1).clamp(min=0)
    return best, (left - least[..., None]).double()


@register("learner", "goal_posterior", family="decisions", papers=("2306.14892",), cases=())
@dataclass(frozen=True, eq=False)
class GoalPosterior(DecisionLearner):
    """Keeps the goals that agree with every transition seen, equally likely, and acts on what they say.

    Where no goal agrees, because the true one is not among them, all are equally likely again.

    size: cells on a side of the room.
    goals: cells that may be the goal, [G] int64.
    act: "least_loss", the action that loses least on average over the goals left, which is Bayes-optimal for one
        choice from given data; "optimal", each action with the probability that it is the optimal one, whose sampling
        is posterior sampling.
    """

    size: PositiveInt
    goals: Tensor
    act: Literal["least_loss", "optimal"] = "least_loss"

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, 5], float32. Raises InputError for prompts of another task."""
        query, until = self._read(prompt)
        alive = torch.arange(prompt.length, device=until.device)[:, None] < until.unsqueeze(1)
        return self._answer(query.flatten(), alive.flatten(0, 1)).view(*query.shape, ACTIONS)

    def last(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, 5] after the whole prompt, float32."""
        query, until = self._read(prompt)
        return self._answer(query[:, -1], until == prompt.length)

    def _read(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """The cells asked about [B, T], and the first token that speaks against each goal [B, G], T for none."""
        inputs = prompt.inputs
        if inputs.ndim != 3 or inputs.shape[-1] != 7 + ACTIONS:
            raise InputError(
                f"goal_posterior needs inputs [B, T, {7 + ACTIONS}], such as darkroom draws; got {list(inputs.shape)}"
            )
        place = ((inputs.float() + 1) * (self.size - 1) / 2).round().long()
        query, after = (place[..., i] * self.size + place[..., i + 1] for i in (0, 9))
        shown, rewarded = inputs[..., 4:9].any(-1), inputs[..., 11] > 0.5
        batch, length = query.shape
        at = torch.arange(length, device=query.device).expand(batch, -1)
        never = torch.full((batch, self.size**2), length, device=query.device)
        missed = never.scatter_reduce(1, after, at.masked_fill(~shown | rewarded, length), "amin")
        hit = never.scatter_reduce(1, after, at.masked_fill(~rewarded, length), "amin")
        # A reward speaks against all goals but its own cell.
        first, second = hit.topk(2, 1, largest=False).values.unsqueeze(-1).unbind(1)
        elsewhere = torch.where(hit == first, second, first)
        return query, missed.minimum(elsewhere)[:, self.goals.to(query.device)]

    def _answer(self, query: Tensor, alive: Tensor) -> Tensor:
        """query [N]; alive [N, G], the goals that agree with what was seen."""
        best, lost = (table.to(query.device) for table in tables(self.size))
        goals = self.goals.to(query.device)
        best, lost = best[:, goals], lost[:, goals]
        out, turn = [], max(1, MOST_CELLS // (len(goals) * ACTIONS))
        for cell, left in zip(query.split(turn), alive.split(turn), strict=True):
            weight = (left | ~left.any(1, keepdim=True)).double()
            share = (weight / weight.sum(1, keepdim=True)).unsqueeze(1)
            if self.act == "least_loss":
                out.append(certain(-(share @ lost[cell]).squeeze(1).round(decimals=9)))  # so that ties are ties
            else:
                named = best[cell].unsqueeze(-1) == torch.arange(ACTIONS, device=cell.device)
                out.append(((1 - SMOOTHING) * (share @ named.double()).squeeze(1) + SMOOTHING / ACTIONS).log())
        return torch.cat(out).float()
