"""Arithmetic written out character by character: the formats, and the learner that evaluates them exactly.

Formats are those of 2307.03381 and its public code. A text is built from blocks of columns [N, width] of character
ids, in which -1 is no character, so that texts of different lengths are written at once; `squeeze` closes the gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import sure_of
from contextlab.learners.arithmetic_scratchpads import (
    add,
    add_simply,
    length_of,
    list_of_digits,
    multiply,
    newton_steps,
    root,
    sine,
    subtract,
    subtract_simply,
    taylor_steps,
)
from contextlab.learners.arithmetic_text import ALPHABET, VOCABULARY, ZERO, fixed, number, squeeze, text
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

Operation = Literal["addition", "subtraction", "multiplication", "sine", "square_root"]
Format = Literal["plain", "reversed", "simple", "detailed"]
SIGN: dict[str, str] = {"addition": "+", "subtraction": "-", "multiplication": "*"}
FUNCTION: dict[str, str] = {"sine": "sin", "square_root": "sqrt"}
FORMATS: dict[str, tuple[str, ...]] = {
    "addition": ("plain", "reversed", "simple", "detailed"),
    "subtraction": ("plain", "reversed", "simple", "detailed"),
    "multiplication": ("plain", "reversed", "detailed"),
    "sine": ("plain", "detailed"),
    "square_root": ("plain", "detailed"),
}
"""Those that the paper's code defines."""
MOST_DIGITS: dict[str, int] = {"addition": 16, "subtraction": 16, "multiplication": 8, "sine": 8, "square_root": 8}
"""Up to which everything fits int64, and sines are exact in float64."""


def question(operation: str, form: str, x: Tensor, y: Tensor, size: int) -> Tensor:
    """What the model is given, up to the first character that it must write: [N, W].

    x, y: [N] int64, the operands; functions leave y.
    """
    if operation in FUNCTION:
        name = FUNCTION[operation]
        asked = torch.cat([text(f"{name}(", x), fixed(x, size), text(")", x)], 1)
    else:
        asked = torch.cat([number(x, size), text(SIGN[operation], x), number(y, size)], 1)
    if form in ("plain", "reversed"):
        return torch.cat([text("$" if form == "reversed" else "", x), asked, text("=", x)], 1)
    return torch.cat([text("Input:\n", x), asked, text("\nTarget:\n", x)], 1)


def solution(operation: str, form: str, x: Tensor, y: Tensor, size: int) -> Tensor:
    """What the model must write, with the character that ends it.

    x, y: operands [N] int64; of a function x / 10^size. size: most digits of an operand, or digits after the point.
    """
    if form == "detailed":
        detailed = {"addition": add, "subtraction": subtract, "multiplication": multiply}
        if operation in detailed:
            head = [torch.cat([list_of_digits(v, size), text(" has ", v), number(length_of(v), 2)], 1) for v in (x, y)]
            lines = [part for block in head for part in (block, text(" digits.\n", x))]
            return torch.cat([text("<scratch>\n", x), *lines, detailed[operation](x, y, size)], 1)
        return torch.cat(
            [text("<scratch>\n", x), taylor_steps(x, size) if operation == "sine" else newton_steps(x, size)], 1
        )
    if form == "simple":
        return (add_simply if operation == "addition" else subtract_simply)(x, y, size)
    if operation in FUNCTION:
        value = sine(x, size) if operation == "sine" else root(x, size)
        return torch.cat([fixed(value, size), text("\n", x)], 1)
    value = {"addition": x + y, "subtraction": x - y, "multiplication": x * y}[operation]
    width = 2 * size if operation == "multiplication" else size + 1
    return torch.cat(
        [number(value, width, backwards=form == "reversed"), text("$" if form == "reversed" else "\n", x)], 1
    )


def check_format(operation: str, form: str, size: int) -> None:
    """Raises InputError for a format that the operation has not, and for operands that do not fit."""
    if form not in FORMATS[operation]:
        raise InputError(f"format {form!r} is not defined for {operation}; use one of {', '.join(FORMATS[operation])}")
    if size > MOST_DIGITS[operation]:
        raise InputError(
            f"digits {size} are too many for {operation}: numbers must fit 64 bits; at most {MOST_DIGITS[operation]}"
        )


@register(
    "learner",
    "arithmetic_evaluator",
    family="state tracking",
    papers=("2307.03381",),
    cases=({"operation": "addition"}, {"operation": "sine", "format": "detailed", "digits": 4}),
)
@dataclass(frozen=True)
class ArithmeticEvaluator(Learner):
    """Reads the operands of each problem, computes, and writes the answer in the format: makes no error.

    Over the characters of a problem it knows nothing, and predicts them all alike.

    operation: "addition", "subtraction", "multiplication", "sine" or "square_root".
    format: "plain", "reversed", "simple" or "detailed".
    digits: most digits of an operand; of functions, digits after the point.
    """

    operation: Operation
    format: Format = "plain"
    digits: PositiveInt = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.operation, self.format, self.digits)

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, characters], float32. Raises InputError for prompts of another task."""
        tokens = token_ids(prompt, VOCABULARY, "arithmetic_evaluator")
        x, y, asked, begun = self._read(tokens)
        rows, problems = x.shape
        (answer,) = squeeze(solution(self.operation, self.format, x.flatten(), y.flatten(), self.digits))
        answer = answer.view(rows, problems, -1)
        at = torch.arange(tokens.shape[1], device=tokens.device)
        which = begun.clamp(min=1) - 1
        place = at - asked.gather(1, which)
        inside = (place >= 0) & (place < answer.shape[2])
        table = answer.flatten(1)
        following = table.gather(1, which * answer.shape[2] + place.clamp(0, answer.shape[2] - 1))
        known = inside & (following > 0)
        return sure_of(following, known, VOCABULARY)

    def _read(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Operands [B, P], where the answer is asked for [B, P] (T if it is not), problems begun so far [B, T]."""
        code = {character: i + 1 for i, character in enumerate(ALPHABET)}
        line = tokens == code["\n"]
        scratch = self.format in ("simple", "detailed")
        before = torch.cat([torch.zeros_like(line[:, :1]), line[:, :-1]], 1)
        first = torch.zeros_like(line)
        first[:, 0] = True
        starts = tokens == code["I"] if scratch else (first | before) & (tokens > 0)
        begun = starts.cumsum(1)
        problems = int(begun.max())
        if not problems:
            raise InputError(
                f"arithmetic_evaluator: no {self.operation} of format {self.format!r} begins in these prompts"
            )
        # Within each problem: the line, counted from 0, and whether the answer has been asked for.
        which = begun.clamp(min=1) - 1
        lines_before = before.cumsum(1)
        row = lines_before - self._since(lines_before, starts)
        if scratch:
            asks, statement = line & (row == 2), row == 1
        else:
            asks = tokens == code["="]
            statement = torch.ones_like(line)
        last = tokens.shape[1]
        at = torch.arange(last, device=tokens.device).expand_as(tokens)
        shape = (len(tokens), problems)
        asked = torch.full(shape, last, device=tokens.device)
        asked = asked.scatter_reduce(1, which, at.masked_fill(~asks | (begun == 0), last), "amin")
        statement = statement & (at < asked.gather(1, which)) & (begun > 0)
        return *self._operands(tokens, statement, which, problems, code), asked, begun

    @staticmethod
    def _since(values: Tensor, starts: Tensor) -> Tensor:
        """The value at the last start, [B, T]; values must not fall."""
        return torch.where(starts, values, 0).cummax(1).values

    def _operands(
        self, tokens: Tensor, statement: Tensor, which: Tensor, problems: int, code: dict[str, int]
    ) -> tuple[Tensor, Tensor]:
        """Both operands of each problem, [B, problems], 0 where there is none."""
        is_digit = statement & (tokens >= ZERO) & (tokens < ZERO + 10)
        values = [torch.zeros(len(tokens), problems, dtype=torch.int64, device=tokens.device) for _ in range(2)]
        function = self.operation in FUNCTION
        splits = code["."] if function else code[SIGN[self.operation]]
        second = torch.zeros_like(which)
        marks = torch.zeros_like(values[0]).scatter_add_(1, which, (statement & (tokens == splits)).long())
        passed = (statement & (tokens == splits)).cumsum(1)
        second = passed - (marks.cumsum(1) - marks).gather(1, which) > 0
        for side, value in enumerate(values):
            mine = is_digit & (second == bool(side))
            count = mine.long()
            total = torch.zeros_like(value).scatter_add_(1, which, count)
            seen = count.cumsum(1) - (total.cumsum(1) - total).gather(1, which)
            # A digit stands for the power of ten by the digits after it; after a point, by those before it.
            place = self.digits - seen if function and side else total.gather(1, which) - seen
            power = 10 ** place.clamp(0, 17)
            value.scatter_add_(1, which, torch.where(mine & (place >= 0), (tokens - ZERO) * power, 0))
        if not function:
            return values[0].clamp(max=10**self.digits - 1), values[1].clamp(max=10**self.digits - 1)
        minus = torch.zeros_like(marks).scatter_add_(1, which, (statement & (tokens == code["-"])).long())
        x = values[0].clamp(max=99) * 10**self.digits + values[1]
        x = torch.where(minus > 0, -x, x)
        if self.operation == "square_root":
            x = x.clamp(min=10**self.digits)  # the format starts from the root's whole part, which must not be 0
        return x, torch.zeros_like(x)
