"""A dark room: transitions in a grid whose goal is not seen, then the move that leads there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.darkroom import ACTIONS, GoalPosterior, moved, moves, tables
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.decisions import DecisionTask, Transitions

MOVES = ("right", "left", "up", "down", "stay")
MOST_SIZE = 32
"""Of a room: what each move loses is listed for every cell and goal, size^4 * 5 numbers."""


@register(
    "task",
    "darkroom",
    family="decisions",
    papers=("2306.14892",),
    cases=({}, {"size": 4, "horizon": 20}, {"size": 5, "horizon": 30, "data": "walk"}),
)
@dataclass(frozen=True)
class DarkRoom(DecisionTask):
    """A grid with a hidden goal: transitions in the room, then the best move in the cell asked about (2306.14892).

    The moves are x + 1, x - 1, y + 1, y - 1 and staying; a move into a wall stays where it is. A step that ends at the
    goal has reward 1, any other 0. The optimal action brings x to the goal's, then y, then stays. Goals of the train
    and the test part are different cells, 80% and 20% of them. Room, reward, optimal action, data and split are as in
    the paper's public code. There, one cell is asked about, before all the data, and an online agent learns from an
    episode after it ended; here every token asks about a cell of its own and shows one transition, so that one pass
    scores all prefixes and an online agent learns from every step.

    A token is the cell asked about, then the transition: cell, move (one-hot), cell, reward; coordinates are scaled to
    -1 .. 1. `suboptimality` counts the rewards that the likeliest move loses if optimal ones follow.

    horizon: transitions in the data set.
    size: cells on a side of the room.
    part: whose goals are drawn, "train" or "test".
    goal_seed: of the goals' split.
    data: "even", cells and moves at random, each transition by itself; "walk", a walk of random moves from the corner
        (0, 0), in which the cell asked about is the one that was reached.
    steps: after which an online agent is put back to the corner.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"size": 5, "horizon": 50, "steps": 25},
        "hard": {"size": 20, "horizon": 400, "steps": 200},
    }

    size: PositiveInt = 10
    part: Literal["train", "test"] = "train"
    goal_seed: NonNegativeInt = 0
    data: Literal["even", "walk"] = "even"
    steps: PositiveInt = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 3:
            raise InputError(f"size {self.size} is too small: both parts of the goals need cells; at least 3")
        if self.size > MOST_SIZE:
            raise InputError(
                f"size {self.size} is too large: moves are listed for every cell and goal; at most {MOST_SIZE}"
            )

    @property
    def actions(self) -> int:
        return ACTIONS

    @property
    def input_size(self) -> int:
        return 7 + ACTIONS

    @property
    def episode(self) -> int:
        return self.steps

    @property
    def goals(self) -> Tensor:
        """The cells of this part, [G] int64."""
        order = torch.randperm(self.size**2, generator=torch.Generator().manual_seed(self.goal_seed))
        cut = int(0.8 * self.size**2)
        return (order[:cut] if self.part == "train" else order[cut:]).sort().values

    def problems(self, batch: int, generator: torch.Generator, device: torch.device | str) -> dict[str, Tensor]:
        """The goal of each prompt, [B]."""
        goals = self.goals.to(device)
        return {"goal": goals[torch.randint(len(goals), (batch,), generator=generator, device=device)]}

    def explore(self, problem: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Transitions]:
        """Transitions from random cells, or a random walk."""
        goal = problem["goal"]
        shape = (len(goal), self.horizon)

        def draw(most: int, extra: int = 0) -> Tensor:
            size = (shape[0], shape[1] + extra)
            return torch.randint(most, size, generator=generator, device=goal.device)

        action = draw(ACTIONS)
        if self.data == "even":
            state, query = draw(self.size**2), draw(self.size**2, 1)
        else:
            cells = [self.start(problem)]
            for move in action.unbind(1):
                cells.append(moved(cells[-1], move, self.size))
            query = torch.stack(cells, 1)
            state = query[:, :-1]
        reward, after = self.step(problem, state, action, generator)
        return query, Transitions(state, action, reward, after)

    def start(self, problem: dict[str, Tensor]) -> Tensor:
        """The corner (0, 0)."""
        return torch.zeros_like(problem["goal"])

    def step(
        self, problem: dict[str, Tensor], state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Reward 1 where a move ends at the goal."""
        after = moved(state, action, self.size)
        return (after == problem["goal"].unsqueeze(1)).float(), after

    def best(self, problem: dict[str, Tensor], state: Tensor) -> Tensor:
        """x first, then y."""
        best, _ = tables(self.size)
        return best.to(state.device).take(state * self.size**2 + problem["goal"].unsqueeze(1))

    def lost(self, problem: dict[str, Tensor], state: Tensor, action: Tensor) -> Tensor:
        """Rewards lost if optimal moves follow: 1 for a move that comes no nearer, 2 for one that leads away."""
        lost = tables(self.size)[1].to(state.device)
        return lost.take((state * self.size**2 + problem["goal"].unsqueeze(1)) * ACTIONS + action).float()

    def encode(self, query: Tensor, seen: Transitions | None) -> Tensor:
        """The cell asked about, and the transition; zeros where none is shown."""
        token = torch.zeros(*query.shape, self.input_size, device=query.device)
        token[..., :2] = self._place(query)
        if seen is not None:
            token[..., 2:4] = self._place(seen.state)
            token[..., 4:9] = F.embedding(seen.action, torch.eye(ACTIONS, device=query.device))
            token[..., 9:11] = self._place(seen.after)
            token[..., 11] = seen.reward
        return token

    def _place(self, cell: Tensor) -> Tensor:
        cells = torch.arange(self.size**2, device=cell.device)
        xy = torch.stack([cells.div(self.size, rounding_mode="floor"), cells % self.size], 1)
        return F.embedding(cell, xy * (2 / (self.size - 1)) - 1)

    def learners(self) -> dict[str, Learner]:
        """Posteriors over the goals of this part, and over all cells.

        `posterior_sampling`, whose likeliest move is the one that is most often the optimal one, has the smaller
        error_rate; it loses more rewards.
        """
        return {
            "least_loss": GoalPosterior(self.size, self.goals),
            "posterior_sampling": GoalPosterior(self.size, self.goals, act="optimal"),
            "least_loss_any_goal": GoalPosterior(self.size, torch.arange(self.size**2)),
        }

    def splits(self) -> dict[str, Task]:
        """'train', goals of the other part, data of the other kind, and twice the data."""
        other = "walk" if self.data == "even" else "even"
        return {
            "train": self,
            "new goals": self.replace(part="test" if self.part == "train" else "train"),
            f"{other} data": self.replace(data=other),
            f"horizon={2 * self.horizon}": self.replace(horizon=2 * self.horizon),
        }

    def chance(self) -> Mapping[str, float]:
        """Of moves at random."""
        lost = tables(self.size)[1][:, self.goals].mean((1, 2))
        return {"suboptimality": float(self._visits() @ lost), "error_rate": 1 - 1 / ACTIONS}

    def _visits(self) -> Tensor:
        """How often each cell is asked about, [cells] float64."""
        cells = self.size**2
        if self.data == "even":
            return torch.full((cells,), 1 / cells, dtype=torch.float64)
        here = F.one_hot(torch.tensor(0), cells).double()
        total = here
        for _ in range(self.horizon):
            share = here.unsqueeze(1).expand(-1, ACTIONS) / ACTIONS
            here = torch.zeros_like(here).index_add_(0, moves(self.size).flatten(), share.flatten())
            total = total + here
        return total / (self.horizon + 1)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """A transition a line, then the cell asked about and its best move; the goal below."""
        assert prompt.hidden is not None
        cell = ((prompt.inputs[row] + 1) * (self.size - 1) / 2).round().long().tolist()
        lines = []
        for at, token, target in zip(cell, prompt.inputs[row], prompt.targets[row].tolist(), strict=True):
            seen = ""
            if token[4:9].any():
                move = MOVES[int(token[4:9].argmax())]
                seen = f"({at[2]}, {at[3]}) {move:>5} -> ({at[9]}, {at[10]}) reward {int(token[11])}   "
            lines.append(f"{seen}at ({at[0]}, {at[1]})? [{MOVES[target]}]")
        goal = int(prompt.hidden["goal"][row])
        return "\n".join([*lines, f"goal ({goal // self.size}, {goal % self.size})"])
