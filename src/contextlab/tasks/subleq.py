"""SUBLEQ programs given in the context, and the memory that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.subleq import INSTRUCTION, PARTS, VALUE, SubleqInterpreter, most_steps, run
from contextlab.prompt import Learner, Prompt, Task, wide
from contextlab.registry import register
from contextlab.tasks.base import check_options

EXACT = 2**24
"""Whole numbers up to here are exact in float32, the dtype of prompts."""
GUESSED = 2**14  # prompts over which the error of predicting zero is averaged


@register(
    "task",
    "subleq",
    family="state tracking",
    papers=("2301.13196",),
    cases=({"lines": 4, "cells": 3, "steps": 4}, {"lines": 6, "cells": 2, "steps": 7, "values": 2}),
)
@dataclass(frozen=True)
class Subleq(Task):
    """A random SUBLEQ program and its memory; the memory after some instructions, and the next line (2301.13196).

    SUBLEQ is a computer of one instruction: (a, b, c) subtracts the number in cell a from that in cell b, and goes on
    with line c where that leaves 0 or less, else with the line below. Cells and jumps are drawn evenly, new for each
    prompt, and so are the memory's numbers, -values .. values. The run begins with line 0. The last line has a = b: it
    clears a cell and always jumps, so that no run leaves the program.

    A token is 8 numbers: what it is (line, cell or run, one of them 1), its address, then a, b and c of a line, or the
    value of a cell; all others are 0. After lines and cells comes one token "run"; there, and only there, the answer is
    scored: the numbers of all cells, then that of the next line.

    lines: of the program.
    cells: of the memory.
    steps: instructions that are carried out.
    values: the largest number that the memory begins with.
    """

    metric: ClassVar[str] = "squared_error"
    one_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"lines": 4, "cells": 3, "steps": 4},
        "hard": {"lines": 16, "cells": 8, "steps": 16},
    }

    lines: PositiveInt = 8
    cells: PositiveInt = 4
    steps: PositiveInt = 8
    values: PositiveInt = 9

    def __post_init__(self) -> None:
        check_options(self)
        if self.steps > (most := most_steps(self.values, EXACT)):
            raise InputError(
                f"steps {self.steps}: from values of up to {self.values} they may reach numbers above 2^24, which "
                f"float32 does not hold exactly; use at most {most}"
            )

    @property
    def input_size(self) -> int:
        return len(PARTS)

    @property
    def output_size(self) -> int:
        return self.cells + 1

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts of lines + cells + 1 vectors, float32."""

        def draw(low: int, high: int, count: int) -> Tensor:
            return torch.randint(low, high, (batch, count), generator=generator, device=device)

        a, b = draw(0, self.cells, self.lines), draw(0, self.cells, self.lines)
        a[:, -1] = b[:, -1]
        program = torch.stack([a, b, draw(0, self.lines, self.lines)], 2)
        memory = draw(-self.values, self.values + 1, self.cells)
        inputs = torch.zeros(batch, self.lines + self.cells + 1, len(PARTS), device=device)
        inputs[:, : self.lines, PARTS.index("line")] = 1.0
        inputs[:, self.lines : -1, PARTS.index("cell")] = 1.0
        inputs[:, -1, PARTS.index("run")] = 1.0
        address = inputs[:, :, PARTS.index("address")]
        address[:, : self.lines] = torch.arange(self.lines, device=device)
        address[:, self.lines : -1] = torch.arange(self.cells, device=device)
        inputs[:, : self.lines, INSTRUCTION] = program.to(inputs)
        inputs[:, self.lines : -1, VALUE] = memory.to(inputs)
        memory, line = run(program, memory, self.steps)
        targets = inputs.new_zeros(batch, inputs.shape[1], self.output_size)
        targets[:, -1] = torch.cat([memory, line.unsqueeze(1)], 1).to(targets)
        scored = inputs[:, :, PARTS.index("run")] == 1
        return Prompt(inputs, targets, scored, torch.zeros_like(scored, dtype=torch.int64))

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean squared error at the token "run", summed over the numbers. prediction: [B, T, cells + 1]."""
        square = (wide(prediction) - prompt.targets).square().sum(-1)
        return (square * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """Of [B, T]: squared_error, summed over the numbers; accuracy, the share of them that are right to the nearest
        whole number; exact_match, 1 where all are."""
        off = (wide(prediction) - prompt.targets).abs()
        right = off < 0.5
        return {
            "squared_error": off.square().sum(-1),
            "accuracy": right.float().mean(-1),
            "exact_match": right.all(-1).float(),
        }

    def learners(self) -> dict[str, Learner]:
        """`interpreter`, which makes no error."""
        return {"interpreter": SubleqInterpreter(self.lines, self.cells, self.steps)}

    def splits(self) -> dict[str, Task]:
        """'train', then twice the instructions, where their numbers are exact, and twice the lines."""
        found: dict[str, Task] = {"train": self}
        if 2 * self.steps <= most_steps(self.values, EXACT):
            found[f"steps={2 * self.steps}"] = self.replace(steps=2 * self.steps)
        found[f"lines={2 * self.lines}"] = self.replace(lines=2 * self.lines)
        return found

    def chance(self) -> Mapping[str, float]:
        """The squared error of predicting zero, over 2^14 prompts of one seed."""
        return {"squared_error": _square(self)}

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The program line by line, the memory, and [the answer]."""
        tokens = prompt.inputs[row].long()
        program, memory = tokens[: self.lines, INSTRUCTION].tolist(), tokens[self.lines : -1, VALUE].tolist()
        *after, line = prompt.targets[row, -1].long().tolist()
        return "\n".join(
            [
                *(f"{number}: {' '.join(map(str, each))}" for number, each in enumerate(program)),
                f"memory {' '.join(map(str, memory))}",
                f"run [memory {' '.join(map(str, after))}, next line {line}]",
            ]
        )


@cache
def _square(task: Subleq) -> float:
    """The mean squared answer of a task."""
    targets = task.sample(GUESSED, torch.Generator().manual_seed(0)).targets
    return targets[:, -1].double().square().sum(-1).mean().item()
