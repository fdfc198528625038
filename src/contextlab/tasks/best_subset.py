"""A dynamic programme: the numbers of highest sum of which no two stand side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.prompt import Task
from contextlab.registry import register
from contextlab.tasks.composition import Part, SolvedTask, kept


@register(
    "task",
    "best_subset",
    family="languages",
    papers=("2305.18654",),
    cases=({"numbers": 4}, {"numbers": 3, "form": "answer"}),
)
@dataclass(frozen=True)
class BestSubset(SolvedTask):
    """The numbers of highest sum of which no two stand side by side (Faith and Fate's dynamic programme, 2305.18654).

    The prompt is the numbers, then `=`; the answer says of each number in order whether it is chosen (Y) or not (N).
    Among equally good answers the one counts that chooses earlier. The scratchpad gives before, from the last number
    to the first, the best sum of what stands from there on. A token's "depth" is its place in the solution: each
    needs the one before. As in the paper's public code, where the answers are lists of 1 and 2.

    Problems whose numbers, counted from the smallest, sum to -1 modulo how many values there are, are the test part.

    numbers: how many.
    most: numbers that there are token ids for; None for twice as many as `numbers`.
    largest: numbers are uniform in -largest .. largest.
    form: "scratchpad" or "answer".
    part: "train" or "test".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"numbers": 4},
        "hard": {"numbers": 12, "form": "answer"},
    }

    numbers: Annotated[int, Field(ge=2)] = 6
    most: PositiveInt | None = None
    largest: PositiveInt = 5
    form: Literal["scratchpad", "answer"] = "scratchpad"
    part: Part = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.numbers > self.limit:
            raise InputError(
                f"numbers {self.numbers} are too many: there are ids for {self.limit}; use most {self.numbers}"
            )

    @property
    def limit(self) -> int:
        """Numbers that there are token ids for."""
        return 2 * self.numbers if self.most is None else self.most

    @property
    def problem(self) -> int:
        return self.numbers + 1

    @property
    def highest(self) -> int:
        """The highest sum that `limit` numbers can have; numbers have ids from -largest to it."""
        return self.largest * ((self.limit + 1) // 2)

    @property
    def input_size(self) -> int:
        return self.largest + self.highest + 1 + 3

    def symbol(self, token: int) -> str:
        """A number, =, Y or N."""
        value = token - self.largest
        return str(value) if value <= self.highest else "=YN"[value - self.highest - 1]

    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        values = 2 * self.largest + 1
        rest = torch.randint(values, (batch, self.numbers - 1), generator=generator, device=device)
        last = kept(rest.sum(1), values, generator, self.part).unsqueeze(1)
        return torch.cat([rest, last, torch.full_like(last, self.largest + self.highest + 1)], 1)

    def solve(self, problems: Tensor) -> Tensor:
        value = problems[:, :-1] - self.largest
        zero = torch.zeros_like(value[:, 0])
        best = [zero, zero]
        for number in value.flip(1).unbind(1):
            best.append(torch.maximum(best[-1], number + best[-2]))
        # best[k + 1] is for the last k numbers
        free, chosen = torch.ones_like(zero, dtype=torch.bool), []
        for i, number in enumerate(value.unbind(1)):
            k = self.numbers - i
            choose = free & (best[k + 1] == number + best[k - 1])
            chosen.append(torch.where(choose, 1, 2) + self.largest + self.highest + 1)
            free = ~choose
        answer = torch.stack(chosen, 1)
        if self.form == "answer":
            return answer
        return torch.cat([torch.stack(best[2:], 1) + self.largest, answer], 1)

    def depth(self) -> Tensor:
        return torch.arange(self.numbers * (2 if self.form == "scratchpad" else 1)) + 1

    def splits(self) -> dict[str, Task]:
        """'train', 'new problems', then as many numbers as there are ids for."""
        found: dict[str, Task] = {"train": self}
        if self.part == "train":
            found["new problems"] = self.replace(part="test")
        if self.numbers < self.limit:
            found[f"numbers={self.limit}"] = self.replace(numbers=self.limit, most=self.limit)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all tokens."""
        return {"accuracy": 1 / self.input_size, "cross_entropy": math.log(self.input_size)}
