"""ListOps of Long Range Arena: nested lists of digits and their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.text import MAX, MED, MIN, ListOpsEvaluator
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "=", "_")
CLOSE, ASK, BLANK = 14, 15, 16
OPERATION = 0.25
"""Probability that a node above the greatest depth is a list and not a digit."""
DEEPEST = 20
MISSES = 4
"""Rounds of drawing trees, none of which is of a length that is kept, after which that is given up."""


@register(
    "task",
    "listops",
    family="text",
    papers=("2011.04006",),
    cases=({"length": 40, "shortest": 5, "depth": 4, "arguments": 4}, {}),
)
@dataclass(frozen=True)
class ListOps(TokenTask):
    """Long Range Arena's ListOps: nested lists under MIN, MAX, MED (median) and SM (sum modulo 10); which digit is it?

    Trees are drawn as the published generator draws them: a node is a digit, or with probability 1/4 (never at the
    greatest depth) a list of 2 to `arguments` nodes; trees whose number of symbols is not between `shortest` and
    `length` are drawn again. The median of an even number of digits is rounded down. Symbols are the operators with
    their opening bracket, digits and closing brackets; the published files also hold parentheses, which repeat the
    brackets. The published sizes are depth 10, 10 arguments and 500 to 2,000 symbols (both left out); the `hard` preset
    has them. What differs: the published set has no two equal expressions; these are independent.

    The prompt is the expression, then "=", where the answer is predicted, then blanks.

    length: greatest number of symbols of an expression; prompts have one token more.
    shortest: smallest number of symbols of an expression.
    depth: greatest depth of the tree; 1 would be a digit alone.
    arguments: most nodes of a list.
    """

    one_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"length": 30, "shortest": 4, "depth": 3, "arguments": 5},
        "hard": {"length": 1999, "shortest": 501, "depth": 10, "arguments": 10},
    }

    length: PositiveInt = 120
    shortest: Annotated[int, Field(ge=4)] = 20
    depth: Annotated[int, Field(ge=2, le=DEEPEST)] = 6
    arguments: Annotated[int, Field(ge=2)] = 6

    def __post_init__(self) -> None:
        check_options(self)
        if self.length < self.shortest:
            raise InputError(f"length {self.length} is below shortest {self.shortest}: choose at least {self.shortest}")
        longest = 1
        for _ in range(self.depth - 1):
            longest = 2 + self.arguments * longest
        if longest < self.shortest:
            raise InputError(
                f"shortest {self.shortest} is beyond what depth {self.depth} and {self.arguments} arguments can make: "
                f"at most {longest}"
            )

    @property
    def input_size(self) -> int:
        return len(SYMBOLS)

    def symbol(self, token: int) -> str:
        """Digits, operators with their bracket, the closing bracket, = and _ for a blank."""
        return SYMBOLS[token]

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs and targets [batch, length + 1] int64; the answer is scored at "="."""
        shape = (batch, self.length + 1)
        inputs = torch.full(shape, BLANK, device=device)
        answer = torch.zeros(batch, dtype=torch.int64, device=device)
        size = torch.zeros(batch, dtype=torch.int64, device=device)
        done, share, misses = 0, 1.0, 0
        while done < batch:
            count = min(int((batch - done) / share) + 32, 50_000)
            forest = _Forest(count, self.depth, self.arguments, self.length, generator, device)
            good = ((forest.size >= self.shortest) & (forest.size <= self.length)).nonzero().squeeze(1)
            share = max(len(good), 0.5) / count
            misses = 0 if len(good) else misses + 1
            if misses == MISSES:
                raise InputError(
                    f"almost no expression of depth {self.depth} has {self.shortest} to {self.length} symbols: "
                    "choose a wider range, a greater depth, or fewer arguments"
                )
            good = good[: batch - done]
            forest.write(good, inputs[done : done + len(good)])
            answer[done : done + len(good)] = forest.value[good]
            size[done : done + len(good)] = forest.size[good]
            done += len(good)
        at = size.unsqueeze(1)
        inputs.scatter_(1, at, ASK)
        targets = torch.zeros_like(inputs).scatter_(1, at, answer.unsqueeze(1))
        scored = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(1, at, True)
        return Prompt(inputs, targets, scored, torch.zeros_like(inputs))

    def learners(self) -> dict[str, Learner]:
        """`listops_evaluator`, which makes no error."""
        return {"evaluator": ListOpsEvaluator(self.depth)}

    def splits(self) -> dict[str, Task]:
        """'train', expressions twice as long, and deeper ones."""
        length, deeper = 2 * self.length, min(self.depth + 2, DEEPEST)
        shortest, depth = min(self.length, 2 * self.shortest), min(self.depth + 1, DEEPEST)
        found: dict[str, Task] = {"train": self}
        found[f"length={length}"] = self.replace(length=length, shortest=shortest, depth=depth)
        if deeper > self.depth:
            found[f"depth={deeper}"] = self.replace(depth=deeper)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the digits."""
        return {"accuracy": 0.1, "cross_entropy": math.log(10)}


class _Forest:
    """Trees drawn level by level, all at once. size, value: [count], symbols and answer of each tree.

    Every root is a list: an expression of one digit is shorter than any that is kept. A tree of more than `most`
    symbols grows no further, and its size is most + 1.
    """

    def __init__(
        self, count: int, depth: int, arguments: int, most: int, generator: torch.Generator, device: torch.device | str
    ) -> None:
        self.kinds: list[Tensor] = []  # a digit or an operator, of each node of a level
        self.parents: list[Tensor] = []  # the number in the level above
        parent = root = torch.arange(count, device=device)
        symbols = torch.zeros(count, dtype=torch.int64, device=device)  # so far, of each tree
        for level in range(1, depth + 1):
            number = len(parent)
            kind = torch.randint(10, (number,), generator=generator, device=device)
            if level < depth:
                uniform = torch.rand(number, generator=generator, device=device)
                operator = torch.randint(MIN, CLOSE, (number,), generator=generator, device=device)
                kind = torch.where((uniform <= OPERATION) | (level == 1), operator, kind)
            self.kinds.append(kind)
            self.parents.append(parent)
            width = torch.randint(2, arguments + 1, (number,), generator=generator, device=device)
            width = width * (kind >= MIN)
            symbols = symbols.index_add_(0, root, torch.where(kind >= MIN, 2, 1))
            least = symbols.index_add(0, root, width)  # with the level below
            width = width * (least <= most)[root]
            symbols = torch.where(least <= most, symbols, most + 1)
            parent = torch.arange(number, device=device).repeat_interleave(width)
            root = root[parent]
        self.sizes: list[Tensor] = []
        value = torch.zeros(0, dtype=torch.int64, device=device)
        for level in range(depth - 1, -1, -1):
            kind = self.kinds[level]
            size, own = torch.ones_like(kind), kind
            if level < depth - 1:
                children = self.parents[level + 1]
                size = torch.where(kind >= MIN, 2, 1).index_add_(0, children, self.sizes[0])
                own = torch.where(kind >= MIN, _apply(kind, children, value), kind)
            self.sizes.insert(0, size)
            value = own
        self.size, self.value = torch.where(symbols > most, most + 1, self.sizes[0]), value

    def write(self, trees: Tensor, out: Tensor) -> None:
        """The symbols of some trees, each in a row of `out`, from its beginning."""
        row = torch.full_like(self.size, -1)
        row[trees] = torch.arange(len(trees), device=trees.device)
        begin = torch.zeros_like(row)
        for level, (kind, size) in enumerate(zip(self.kinds, self.sizes, strict=True)):
            if level:
                parent = self.parents[level]
                # What stands before a node in its list: the sizes of the nodes before it on the level, less those of
                # other lists.
                before = size.cumsum(0) - size
                number = torch.arange(len(kind), device=kind.device)
                first = torch.full_like(begin, len(kind)).scatter_reduce_(0, parent, number, "amin")
                begin = begin[parent] + 1 + before - before[first[parent]]
                row = row[parent]
            shown = row >= 0
            out[row[shown], begin[shown]] = kind[shown]
            lists = shown & (kind >= MIN)
            out[row[lists], begin[lists] + size[lists] - 1] = CLOSE


def _apply(kind: Tensor, parent: Tensor, value: Tensor) -> Tensor:
    """What each operator of a level makes of its nodes. parent, value: of the nodes of the level below."""
    order = torch.argsort(10 * parent + value)  # by list, then by value
    value = value[order]
    count = torch.bincount(parent, minlength=len(kind))
    first = count.cumsum(0) - count
    last = len(value) - 1

    def at(place: Tensor) -> Tensor:
        return value[place.clamp(0, last)] if len(value) else torch.zeros_like(place)

    low, high = at(first), at(first + count - 1)
    middle = (at(first + (count - 1) // 2) + at(first + count // 2)) // 2
    total = torch.zeros_like(kind).index_add_(0, parent[order], value) % 10
    return torch.where(kind == MIN, low, torch.where(kind == MAX, high, torch.where(kind == MED, middle, total)))
