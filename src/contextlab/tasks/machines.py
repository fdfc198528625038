"""Turing machines given in the context, and the trace of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.prompt import Task
from contextlab.registry import register
from contextlab.tasks.composition import SolvedTask


@register(
    "task",
    "turing_machine",
    family="languages",
    papers=("2507.13332", "2411.01992"),
    cases=(
        {"states": 2, "cells": 4, "steps": 3},
        {"states": 2, "cells": 4, "steps": 3, "form": "answer"},
    ),
)
@dataclass(frozen=True)
class TuringMachine(SolvedTask):
    """A random Turing machine and its tape in the context; then the run step by step, and the tape at its end.

    A rule is five tokens: the state and the symbol read, then the symbol written, the move and the next state; the
    rules of each prompt are drawn anew and stand in random order, then comes the tape. The head begins at the first
    cell in state q0; the tape is a ring. In the trace each step is one atomic state: the symbol that is read, fetched
    from where the tape or an earlier step has it, then what the rule says. The form "bare" leaves out the fetched
    symbol, the form "answer" the whole trace: so the parts of Turing machine imitation (TAIL, 2507.13332: linear
    atomic states and explicit fetching of memory) can be taken away one by one. That paper's traces are texts of 18
    algorithms; this task is not among them. "depth" of a token is its step, and one more for the last tape.

    states: of the machine.
    symbols: on the tape.
    cells: of the tape.
    steps: of the run.
    form: "trace", "bare" or "answer".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"states": 2, "cells": 4, "steps": 4},
        "hard": {"states": 4, "symbols": 3, "cells": 16, "steps": 32, "form": "bare"},
    }

    states: PositiveInt = 3
    symbols: Annotated[int, Field(ge=2)] = 2
    cells: Annotated[int, Field(ge=2)] = 8
    steps: PositiveInt = 12
    form: Literal["trace", "bare", "answer"] = "trace"

    @property
    def problem(self) -> int:
        return 5 * self.states * self.symbols + self.cells + 1

    @property
    def input_size(self) -> int:
        return self.symbols + self.states + 3

    def symbol(self, token: int) -> str:
        """A symbol of the tape, a state as q0, q1, ..., a move < or >, or =."""
        if token < self.symbols:
            return str(token)
        token -= self.symbols
        return f"q{token}" if token < self.states else "<>="[token - self.states]

    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        rules = self.states * self.symbols

        def draw(below: int, count: int) -> Tensor:
            return torch.randint(below, (batch, count), generator=generator, device=device)

        number = torch.arange(rules, device=device).expand(batch, -1)
        rule = torch.stack(
            [
                number // self.symbols + self.symbols,
                number % self.symbols,
                draw(self.symbols, rules),
                draw(2, rules) + self.symbols + self.states,
                draw(self.states, rules) + self.symbols,
            ],
            2,
        )
        order = torch.rand(batch, rules, generator=generator, device=device).argsort(1)
        rule = rule.gather(1, order.unsqueeze(2).expand(-1, -1, 5)).flatten(1)
        tape = draw(self.symbols, self.cells)
        return torch.cat([rule, tape, torch.full_like(tape[:, :1], self.input_size - 1)], 1)

    def solve(self, problems: Tensor) -> Tensor:
        rule = problems[:, : 5 * self.states * self.symbols].view(len(problems), -1, 5)
        number = (rule[..., 0] - self.symbols) * self.symbols + rule[..., 1]
        table = torch.zeros_like(rule[..., 2:]).scatter_(1, number.unsqueeze(2).expand(-1, -1, 3), rule[..., 2:])
        tape = problems[:, -self.cells - 1 : -1].clone()
        head = torch.zeros_like(problems[:, :1])
        state, trace = torch.full_like(head, self.symbols), []
        for _ in range(self.steps):
            read = tape.gather(1, head)
            number = ((state - self.symbols) * self.symbols + read).unsqueeze(2).expand(-1, -1, 3)
            step = table.gather(1, number).squeeze(1)
            tape.scatter_(1, head, step[:, :1])
            head = (head + torch.where(step[:, 1:2] == self.symbols + self.states, -1, 1)) % self.cells
            state = step[:, 2:]
            trace.append(torch.cat([read, step], 1) if self.form == "trace" else step)
        return torch.cat([*trace, tape], 1) if self.form != "answer" else tape

    def depth(self) -> Tensor:
        each = {"trace": 4, "bare": 3, "answer": 0}[self.form]
        steps = torch.arange(self.steps).repeat_interleave(each) + 1
        return torch.cat([steps, torch.full((self.cells,), self.steps + 1)])

    def splits(self) -> dict[str, Task]:
        """'train', then twice the steps, and twice the cells."""
        return {
            "train": self,
            f"steps={2 * self.steps}": self.replace(steps=2 * self.steps),
            f"cells={2 * self.cells}": self.replace(cells=2 * self.cells),
        }

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all tokens."""
        return {"accuracy": 1 / self.input_size, "cross_entropy": math.log(self.input_size)}
