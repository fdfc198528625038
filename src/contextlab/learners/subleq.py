"""SUBLEQ programs: the interpreter, and how large numbers can grow in their memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

PARTS = ("line", "cell", "run", "address", "a", "b", "c", "value")
"""The numbers of a token, in order: what it is (one of three), its address, its instruction or its value."""
KINDS, INSTRUCTION, VALUE = slice(0, 3), slice(4, 7), 7
EXACT = 2**53
"""Whole numbers up to here are exact in float64."""


def run(program: Tensor, memory: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Memory and the number of the next line after so many instructions, from line 0 on.

    An instruction (a, b, c) is memory[b] -= memory[a]; the next line is c where that leaves 0 or less, else the one
    below.

    program: [B, lines, 3] int64. memory: [B, cells] int64. Gives [B, cells] and [B] int64.
    """
    memory, line = memory.clone(), program.new_zeros(len(program), 1)
    for _ in range(steps):
        now = program.gather(1, line.unsqueeze(2).expand(-1, -1, 3)).squeeze(1)
        a, b, c = now.split(1, 1)
        left = memory.gather(1, b) - memory.gather(1, a)
        memory.scatter_(1, b, left)
        line = torch.where(left <= 0, c, line + 1)
    return memory, line.squeeze(1)


def most_steps(values: int, limit: int) -> int:
    """The most instructions after which no number can be larger than `limit`, from numbers of up to `values`.

    Each subtracts one cell from another, so that the two largest grow at most as Fibonacci's numbers do.
    """
    before, now, steps = values, values, -1
    while now <= limit:
        before, now, steps = now, before + now, steps + 1
    return steps


@register(
    "learner", "subleq_interpreter", family="state tracking", papers=("2301.13196",),
    cases=({"lines": 3, "cells": 2, "steps": 4},),
)  # fmt: skip
@dataclass(frozen=True)
class SubleqInterpreter(Learner):
    """Runs the SUBLEQ program that a prompt of the task subleq holds, in whole numbers.

    It answers at the last token, which has read program and memory: the memory after so many instructions, and the
    number of the next line. Before, its answers are 0.

    lines: of the program.
    cells: of the memory.
    steps: instructions that are carried out.
    """

    lines: PositiveInt
    cells: PositiveInt
    steps: PositiveInt

    def __call__(self, prompt: Prompt) -> Tensor:
        """Predictions [B, T, cells + 1], of the prompt's dtype.

        Raises InputError for a prompt of another form, for a program that can leave its lines or its memory, and for
        numbers that could become larger than 2^53.
        """
        program, memory = self._read(prompt.inputs)
        answer = prompt.inputs.new_zeros(prompt.batch, prompt.length, self.cells + 1)
        memory, line = run(program, memory, self.steps)
        answer[:, -1] = torch.cat([memory, line.unsqueeze(1)], 1).to(answer)
        return answer

    def _read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        length = self.lines + self.cells + 1
        if not tokens.is_floating_point() or tokens.shape[1:] != (length, len(PARTS)):
            raise InputError(
                f"subleq_interpreter with lines {self.lines}, cells {self.cells} reads {length} vectors of "
                f"{len(PARTS)} numbers, as subleq draws; got {list(tokens.shape[1:])}"
            )
        kind = torch.tensor([0] * self.lines + [1] * self.cells + [2], device=tokens.device)
        program, memory = tokens[:, : self.lines, INSTRUCTION], tokens[:, self.lines : -1, VALUE]
        if not (tokens[..., KINDS] == torch.nn.functional.one_hot(kind, 3)).all():
            raise InputError(
                f"subleq_interpreter with lines {self.lines}, cells {self.cells} reads so many lines and cells, then "
                "one token that runs the program, as subleq draws; the prompt has others"
            )
        below = program.new_tensor([self.cells, self.cells, self.lines])
        whole = (program == program.round()).all() and (memory == memory.round()).all()
        if (
            not whole
            or (program < 0).any()
            or (program >= below).any()
            or (program[:, -1, 0] != program[:, -1, 1]).any()
        ):
            raise InputError(
                "subleq_interpreter: expected whole numbers, instructions of cells and lines that there are, and a "
                "last line with a = b, which always jumps"
            )
        if most_steps(int(memory.abs().max().clamp_min(1)), EXACT) < self.steps:
            raise InputError(
                f"steps {self.steps}: numbers could become larger than 2^53; use at most {most_steps(1, EXACT)} steps, "
                "and smaller numbers"
            )
        return program.long(), memory.long()
