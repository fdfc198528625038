"""Arithmetic in characters: five operations, in up to four formats of the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.arithmetic import (
    FUNCTION,
    MOST_DIGITS,
    ArithmeticEvaluator,
    Format,
    Operation,
    check_format,
    question,
    solution,
)
from contextlab.learners.arithmetic_text import ALPHABET, NOTHING, VOCABULARY, squeeze
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask

HELD_OUT = 10
"""One in so many operands is in the test part."""
CARRIES = (0.45, 0.55)
"""Probability that two random digits carry, without and with a carry from before."""


@register(
    "task",
    "arithmetic",
    family="state tracking",
    papers=("2307.03381",),
    cases=(
        {},
        {"operation": "subtraction", "format": "reversed", "problems": 3},
        {"operation": "subtraction", "format": "simple", "digits": 2},
        {"operation": "multiplication", "format": "detailed"},
        {"operation": "sine", "format": "detailed"},
        {"operation": "square_root"},
    ),
)
@dataclass(frozen=True)
class Arithmetic(TokenTask):
    """Addition, subtraction, multiplication, sines and square roots, written character by character (2307.03381).

    Formats, after the paper's public code: "plain" is `12+34=46` and a new line; "reversed" is `$12+34=64$`, the lowest
    digit first; "simple" writes digit and carry of each place before the answer; "detailed" also what is left of the
    operands and how each place is computed (for multiplication the partial products, for the square root four steps
    of Newton's iteration, for the sine four terms of Taylor's series). The code defines "simple" for addition and
    subtraction only, and no "reversed" for functions. All that is to be written is scored: it is fed back, and each
    character scored at the one before it.

    Operands of functions are uniform on [1, 10) (square root) and [-pi/2, pi/2] (sine), and they and all results are
    rounded down. Here that is done in whole numbers, but for the sine's terms; the code rounds floats again and again,
    which sometimes loses one unit of the last digit. Its data sets list pairs once; here every prompt is a fresh draw.

    operation: "addition", "subtraction" (results may be negative), "multiplication", "sine" or "square_root".
    format: "plain", "reversed", "simple" or "detailed".
    digits: most digits of an operand; of functions, digits after the point. None for 3 in addition and subtraction, 2
        in multiplication, 4 in functions.
    operands: how two operands are drawn. "digits": both below 10^k, where k = 1, 2, 3, ... have weights 1, 9, 90, ....
        "balanced", as in the code: the same, but in addition and subtraction those of the greatest k are drawn so that
        all numbers of carries that x + y can have, 0 to `digits`, are equally likely in the end. "carries": in addition
        and subtraction, all numbers of carries that k places can have, for each k. "uniform": both below 10^digits.
        "longest": both with exactly so many digits.
    problems: in one prompt, one after another.
    part: "train", or "test" for the tenth of operands, chosen by a hash, that the train part never has (in either
        order).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"format": "reversed", "digits": 2},
        "hard": {"operation": "multiplication", "digits": 5},
    }

    operation: Operation = "addition"
    format: Format = "plain"
    digits: PositiveInt | None = None
    operands: Literal["balanced", "digits", "carries", "uniform", "longest"] = "balanced"
    problems: PositiveInt = 1
    part: Literal["train", "test"] = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.operation, self.format, self.size)
        if self.operation in FUNCTION and self.operands != "balanced":
            raise InputError(f"operands {self.operands!r} are for two numbers; use 'balanced' for {self.operation}")

    @property
    def size(self) -> int:
        """Most digits of an operand; of functions, digits after the point."""
        if self.digits is not None:
            return self.digits
        return {"multiplication": 2, "sine": 4, "square_root": 4}.get(self.operation, 3)

    @property
    def input_size(self) -> int:
        return VOCABULARY

    def symbol(self, token: int) -> str:
        """The character; nothing for padding."""
        return ALPHABET[token - 1] if token else ""

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The text, with what is to be written in brackets «»."""
        shown, inside = [self.symbol(int(prompt.inputs[row, 0]))], False
        for scored, target in zip(prompt.scored[row].tolist(), prompt.targets[row].tolist(), strict=True):
            if scored != inside:
                shown.append("«" if scored else "»")
                inside = scored
            shown.append(self.symbol(target))
        return "".join(shown) + ("»" if inside else "")

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts; `hidden` has the operands "x" and "y", [batch, problems] (of functions x / 10^digits)."""
        x, y = self._operands(batch * self.problems, generator, device)
        given = question(self.operation, self.format, x, y, self.size)
        answer = solution(self.operation, self.format, x, y, self.size)
        blocks = [given, answer]
        if self.format == "reversed":
            blocks.append(torch.full_like(given[:, :1], ALPHABET.index("\n") + 1))
        block = torch.cat(blocks, 1)
        asked = torch.zeros_like(block)
        asked[:, given.shape[1] : given.shape[1] + answer.shape[1]] = 1
        shot = torch.arange(self.problems, device=block.device).repeat(batch).unsqueeze(1).expand_as(block)
        tokens, asked, shot = squeeze(*(each.reshape(batch, -1) for each in (block, asked, shot)))
        shot = shot.cummax(1).values  # the padding belongs to the last problem
        hidden = {"x": x.view(batch, -1), "y": y.view(batch, -1)}
        return Prompt(tokens[:, :-1], tokens[:, 1:], asked[:, 1:].bool(), shot[:, 1:].contiguous(), hidden=hidden)

    def _operands(self, count: int, generator: torch.Generator, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Of this part, [count] each."""
        kept: list[Tensor] = []
        wanted, share = count, 1 / HELD_OUT if self.part == "test" else 1 - 1 / HELD_OUT
        while wanted > 0:
            both = torch.stack(self._draw(int(1.2 * wanted / share) + 16, generator, device))
            good = both[:, held_out(*both.unbind(0)) == (self.part == "test")][:, :wanted]
            kept.append(good)
            wanted -= good.shape[1]
        x, y = torch.cat(kept, 1).unbind(0)
        return x, y

    def _draw(self, count: int, generator: torch.Generator, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Of both parts."""

        def uniform(rows: int = 1) -> Tensor:
            return torch.rand(rows, count, generator=generator, device=device, dtype=torch.float64)

        if self.operation in FUNCTION:
            low, width = (1.0, 9.0) if self.operation == "square_root" else (-math.pi / 2, math.pi)
            x = ((low + width * uniform()[0]) * 10**self.size).floor().long()
            return x, torch.zeros_like(x)
        if self.operands in ("uniform", "longest"):
            low = 10 ** (self.size - 1) if self.operands == "longest" and self.size > 1 else 0
            x, y = torch.randint(low, 10**self.size, (2, count), generator=generator, device=device)
            return x, y
        power = 10 ** torch.arange(self.size, device=device)
        places = (uniform() * 10 ** (self.size - 1)).long().view(-1, 1)  # 0; 1 to 9; 10 to 99; ...
        length = 1 + (places >= power[:-1]).sum(1) if self.size > 1 else torch.ones_like(places[:, 0])
        if self.operands == "digits" or self.operation == "multiplication":
            x, y = (uniform(2) * 10**length).long()
            return x, y
        table_of_counts = _carry_shares(self.size, self.operands == "balanced").to(device).cumsum(1)
        left = (
            (uniform()[0].unsqueeze(1) >= table_of_counts[length]).sum(1).clamp(max=self.size)
        )  # carries still to come
        table, pairs = _carry_table(self.size).to(device), _pairs().to(device)
        carry, x, y = torch.zeros_like(left), torch.zeros_like(left), torch.zeros_like(left)
        for i in range(self.size):
            more, active = (length - i).clamp(min=0), length > i
            chance = table[more, carry, left]
            after = (uniform()[0] < chance).long() * active
            count_of = torch.where(carry == after, 55, 45)  # pairs of digits that do so
            pick = (uniform()[0] * count_of).long()
            a, b = pairs[carry, after, pick].unbind(1)
            x, y = x + a * active * 10**i, y + b * active * 10**i
            carry, left = torch.where(active, after, carry), left - after
        return x, y

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy and cross_entropy of characters, and exact_match: 1 where its whole answer is right, [B, T]."""
        found = super().errors(prediction, prompt)
        wrong = (found["accuracy"] == 0) & prompt.scored
        count = torch.zeros(prompt.batch, self.problems, device=wrong.device)
        count = count.scatter_add_(1, prompt.shot, wrong.to(count.dtype))
        return {**found, "exact_match": (count == 0).float().gather(1, prompt.shot)}

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "digits", of the longer operand; in addition and subtraction "carries", of x + y."""
        found = super().facets(prompt)
        if self.operation in FUNCTION or prompt.hidden is None:
            return found
        x, y = prompt.hidden["x"], prompt.hidden["y"]
        power = 10 ** torch.arange(1, self.size + 1, device=x.device)
        found["digits"] = 1 + (torch.maximum(x, y).unsqueeze(-1) >= power).sum(-1).gather(1, prompt.shot)
        if self.operation != "multiplication":
            found["carries"] = carries(x, y, self.size).gather(1, prompt.shot)
        return found

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, which makes no error."""
        return {"evaluator": ArithmeticEvaluator(self.operation, self.format, self.size)}

    def splits(self) -> dict[str, Task]:
        """'train', operands held out, then one digit more and twice the digits, both operands so long."""
        found: dict[str, Task] = {"train": self, "held-out operands": self.replace(part="test")}
        longest = {} if self.operation in FUNCTION else {"operands": "longest"}
        for digits in (self.size + 1, 2 * self.size):
            if digits <= MOST_DIGITS[self.operation]:
                found[f"digits={digits}"] = self.replace(digits=digits, part="test", **longest)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all characters."""
        return {"accuracy": 1 / VOCABULARY, "cross_entropy": math.log(VOCABULARY)}


def held_out(x: Tensor, y: Tensor) -> Tensor:
    """Whether operands x, y [N] are in the test part: [N] bool, the same in either order."""
    low, high = torch.minimum(x, y), torch.maximum(x, y)
    # int64 wraps around, which is what a multiplicative hash wants; the shifts bring high bits down
    mixed = (low * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E01) ^ (high * 0x3C79AC492BA7B65 + 0x1CE4E5B9BF58476)
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        mixed = (mixed ^ (mixed >> 29)) * factor
    return (mixed ^ (mixed >> 32)) % HELD_OUT == 0


def carries(x: Tensor, y: Tensor, size: int) -> Tensor:
    """Number of carries in x + y [N]: [N] int64."""
    power = 10 ** torch.arange(1, size + 1, device=x.device)
    return (x.unsqueeze(-1) % power + y.unsqueeze(-1) % power >= power).sum(-1)


@lru_cache(maxsize=8)
def _carry_table(size: int) -> Tensor:
    """The probability that the next of `more` places carries, given that `left` of them do in all.

    [more, carry from before, left], from the probability of each number of carries in so many places.
    """
    mass, table = _carry_mass(size), torch.zeros(size + 1, 2, size + 2, dtype=torch.float64)
    for more in range(1, size + 1):
        for carry, share in enumerate(CARRIES):
            with_carry = share * torch.cat([mass.new_zeros(1), mass[more - 1, 1, :-1]])
            table[more, carry] = with_carry / mass[more, carry].clamp(min=1e-300)
    return table


@lru_cache(maxsize=8)
def _carry_mass(size: int) -> Tensor:
    """The probability of each number of carries in places of random digits, [places, carry from before, count]."""
    mass = torch.zeros(size + 1, 2, size + 2, dtype=torch.float64)
    mass[0, :, 0] = 1
    for more in range(1, size + 1):
        for carry, share in enumerate(CARRIES):
            mass[more, carry] = (1 - share) * mass[more - 1, 0]
            mass[more, carry, 1:] += share * mass[more - 1, 1, :-1]
    return mass


@lru_cache(maxsize=8)
def _carry_shares(size: int, balanced: bool) -> Tensor:
    """The share of each number of carries among operands below 10^k, [k, count].

    Equal ones for each k; or, `balanced`, those of random digits for all k but the last, and of the last what makes the
    shares of all operands equal.
    """
    count = torch.arange(size + 2)
    places = torch.arange(size + 1).unsqueeze(1)
    if not balanced:
        return (count <= places) / (places + 1.0).double()
    shares = _carry_mass(size)[:, 0].clone()
    weight = torch.tensor([0.0, 1.0, *(9.0 * 10**k for k in range(size - 1))], dtype=torch.float64)
    weight = weight / weight.sum()
    rest = (count <= size) / (size + 1.0) - weight[:-1] @ shares[:-1]
    shares[size] = rest / weight[size]
    return shares


@lru_cache(maxsize=1)
def _pairs() -> Tensor:
    """The pairs of digits by the carry before and the carry after, [2, 2, 55, 2]."""
    found = torch.full((2, 2, 55, 2), NOTHING)
    for before in (0, 1):
        for after in (0, 1):
            some = [(a, b) for a in range(10) for b in range(10) if (a + b + before >= 10) == bool(after)]
            found[before, after, : len(some)] = torch.tensor(some)
    return found
