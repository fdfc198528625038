"""Long multiplication, digit by digit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.prompt import Task
from contextlab.registry import register
from contextlab.tasks.composition import Part, SolvedTask, kept


@register(
    "task",
    "long_multiplication",
    family="languages",
    papers=("2305.18654", "2407.15360"),
    cases=({"digits": 2}, {"digits": 2, "form": "answer", "second_digits": 1}),
)
@dataclass(frozen=True)
class LongMultiplication(SolvedTask):
    """Multiplication of two numbers digit by digit, with or without the partial products (Faith and Fate, 2305.18654).

    The prompt is the two numbers, highest digit first, then `=`. The solution: for each digit of the second
    number, lowest first, its product with the first number, lowest digit first, ended by `+`; after the last, `:`
    and the product, lowest digit first. A token's "depth" counts the digits that it takes one after another: digit i
    of a partial product needs digit i - 1 for its carry, digit k of the product needs digit k - 1 and the
    partial digits of its column. So partly right solutions can be scored by depth and by digit. The paper's
    public graphs have further nodes for carries and residues, and its prompts are text.

    Problems whose digits sum to 9 modulo 10 are the test part.

    digits: of the first number.
    second_digits: of the second number; None for as many.
    form: "scratchpad", or "answer" for the product only.
    part: "train" or "test".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"digits": 2},
        "hard": {"digits": 5, "form": "answer"},
    }

    digits: PositiveInt = 3
    second_digits: PositiveInt | None = None
    form: Literal["scratchpad", "answer"] = "scratchpad"
    part: Part = "train"

    @property
    def second(self) -> int:
        """Digits of the second number."""
        return self.digits if self.second_digits is None else self.second_digits

    @property
    def problem(self) -> int:
        return self.digits + self.second + 2

    @property
    def input_size(self) -> int:
        return 14

    def symbol(self, token: int) -> str:
        """A digit or a sign."""
        return "0123456789*=+:"[token]

    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        digits = torch.randint(10, (batch, self.digits + self.second), generator=generator, device=device)
        for first, size in ((0, self.digits), (self.digits, self.second)):
            if size > 1:
                digits[:, first] = torch.randint(1, 10, (batch,), generator=generator, device=device)
        # A digit that may be 0 is the one that puts the problem in its part.
        free = 0 if self.digits == 1 else self.digits - 1
        digits[:, free] = 0
        digits[:, free] = kept(digits.sum(1), 10, generator, self.part)
        sign = digits.new_tensor([10, 11]).expand(batch, -1)
        return torch.cat([digits[:, : self.digits], sign[:, :1], digits[:, self.digits :], sign[:, 1:]], 1)

    def solve(self, problems: Tensor) -> Tensor:
        a, b = problems[:, : self.digits].flip(1), problems[:, self.digits + 1 : -1].flip(1)
        columns = problems.new_zeros(len(problems), self.digits + self.second)
        pieces = []
        for j in range(self.second):
            line = F.pad(a * b[:, j : j + 1], (0, 1))
            columns[:, j : j + self.digits + 1] += line
            ends = torch.full_like(a[:, :1], 12 if j + 1 < self.second else 13)
            pieces += [_carry(line), ends]
        product = _carry(columns)
        return product if self.form == "answer" else torch.cat([*pieces, product], 1)

    def depth(self) -> Tensor:
        product = torch.arange(self.digits + self.second) + 2
        if self.form == "answer":
            return product
        line = torch.arange(self.digits + 1) + 1
        return torch.cat([*[F.pad(line, (0, 1), value=1)] * self.second, product])

    def splits(self) -> dict[str, Task]:
        """'train', 'new problems', then one digit more in each number."""
        found: dict[str, Task] = {"train": self}
        if self.part == "train":
            found["new problems"] = self.replace(part="test")
        longer = self.replace(digits=self.digits + 1, second_digits=self.second + 1)
        return {**found, f"digits={self.digits + 1}": longer}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all tokens."""
        return {"accuracy": 1 / self.input_size, "cross_entropy": math.log(self.input_size)}


def _carry(columns: Tensor) -> Tensor:
    """Decimal digits from sums in each place, lowest first, [B, n]."""
    carry, digits = torch.zeros_like(columns[:, 0]), []
    for column in columns.unbind(1):
        total = column + carry
        digits.append(total % 10)
        carry = total // 10
    return torch.stack(digits, 1)
