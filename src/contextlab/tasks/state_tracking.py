"""State tracking: the state after each of a stream of changes (group words, counters)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask
from contextlab.tasks.corrupting import chosen_of
from contextlab.tasks.groups import MOST_ELEMENTS, _factors, group_of

TRIES = 16
"""Other texts of steps that are drawn to find one with another end."""


@register(
    "task",
    "group_word",
    family="state tracking",
    papers=("2404.08819",),
    cases=(
        {"group": "Z2", "length": 12},
        {"group": "Z7", "length": 12, "elements": "generators"},
        {"group": "S3", "length": 16, "elements": "swaps"},
        {"group": "A4xZ5", "length": 8},
    ),
)
@dataclass(frozen=True)
class GroupWord(TokenTask):
    """The word problem of a group: after each element, the product of all so far (2404.08819).

    Z2 is the parity of a stream of bits, Zm is addition modulo m, S3, A5 and S5 are permutations. The paper's point:
    what constant-depth transformers and linear state-space models compute is in TC0, and words of A5 and S5 are not,
    unless TC0 = NC1. A token is an element, and the target at its place is the state after it. The product of two
    permutations applies the left one first; element 0 is the identity, and all are numbered in the order of what they
    make of 1, 2, ...

    group: a cyclic (Z2, Z60), symmetric (S3) or alternating group (A5), or a direct product of such (A4xZ5).
    length: elements in the word.
    elements: that are drawn, evenly: "all"; "generators" (of Zm 0 and 1, of Sn one swap and one cycle of all, of An
        the cycles (1 2 k), of a product those of its parts); "swaps" (of Sn, and the identity).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"group": "Z2", "length": 16},
        "hard": {"group": "S5", "length": 128},
    }

    group: str = "S5"
    length: PositiveInt = 32
    elements: Literal["all", "generators", "swaps"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[ZSA]\d{1,4}(x[ZSA]\d{1,4})*", self.group):
            raise InputError(
                f"group {self.group[:40]!r} is unknown: use a cyclic group such as Z60, a symmetric one such as S5, "
                "an alternating one such as A5, or a product such as A4xZ5"
            )
        order = 1
        for kind, size in _factors(self.group):
            if size < (least := {"Z": 2, "S": 2, "A": 3}[kind]):
                raise InputError(
                    f"group {kind}{size} has one element or none; the smallest of its kind is {kind}{least}"
                )
            order *= size if kind == "Z" else math.factorial(min(size, 10)) // (2 if kind == "A" else 1)
        if order > MOST_ELEMENTS:
            raise InputError(f"group {self.group} has more than {MOST_ELEMENTS} elements; at most S6, A6 or Z1000")
        if self.elements == "swaps" and not (self.group.startswith("S") and "x" not in self.group):
            raise InputError(f"elements 'swaps' needs a symmetric group such as S5, and the group is {self.group}")

    @property
    def input_size(self) -> int:
        return len(group_of(self.group).names)

    def symbol(self, token: int) -> str:
        """A number, a permutation in cycles ('e' for the identity), or a tuple of such."""
        return group_of(self.group).names[token]

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw words: inputs and targets [batch, length] int64, all scored; `shot` is the elements before."""
        group = group_of(self.group)
        drawn = torch.tensor(group.drawn(self.elements), device=device)
        inputs = drawn[torch.randint(len(drawn), (batch, self.length), generator=generator, device=device)]
        table, state = group.table.to(device), torch.zeros(batch, dtype=torch.int64, device=device)
        targets = []
        for element in inputs.unbind(1):
            state = table[state, element]
            targets.append(state)
        shot = torch.arange(self.length, device=device).expand(batch, -1)
        return Prompt(inputs, torch.stack(targets, 1), torch.ones_like(inputs, dtype=torch.bool), shot)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """One element before the last is another one, so that every later product is, too."""
        if self.length == 1:
            raise InputError("corrupt: a word of one element has no element before the last; use length 2 or more")
        drawn = torch.tensor(group_of(self.group).drawn(self.elements), device=prompt.inputs.device)
        place = torch.randint(self.length - 1, (prompt.batch, 1), generator=generator, device=drawn.device)
        new = drawn[chosen_of(drawn != prompt.inputs.gather(1, place), generator)[0]]
        inputs = prompt.inputs.scatter(1, place, new)
        return replace(prompt, inputs=inputs, targets=self.products(inputs))

    def products(self, tokens: Tensor) -> Tensor:
        """The product of the elements [B, T] up to each place, [B, T].

        Found in log2(length) steps, each of which doubles their span.
        """
        table, span = group_of(self.group).table.to(tokens.device), 1
        while span < tokens.shape[1]:
            tokens = torch.cat([tokens[:, :span], table[tokens[:, :-span], tokens[:, span:]]], 1)
            span *= 2
        return tokens

    def learners(self) -> dict[str, Learner]:
        """`product`, which makes no error."""
        return {"product": Program(self.products, self.output_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then 'length=N' with twice and four times the elements."""
        return {"train": self, **{f"length={n}": self.replace(length=n) for n in (2 * self.length, 4 * self.length)}}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the elements."""
        return {"accuracy": 1 / self.output_size, "cross_entropy": math.log(self.output_size)}


@register(
    "task",
    "counters",
    family="state tracking",
    cases=({"length": 16}, {"counters": 3, "limit": 4, "length": 24, "at_limit": "wrap"}),
)
@dataclass(frozen=True)
class Counters(TokenTask):
    """Counters that go up and down: after each step, the value of the counter that it moved.

    A token is a counter with a direction, drawn uniformly; the counters begin at 0. With at_limit "stay" a step
    beyond the ends is lost, so that the state cannot be told from sums; with "wrap" it can (addition modulo limit).
    `shot` is the steps before.

    counters: that are kept at once.
    limit: values of each, 0 to limit - 1.
    length: steps in the prompt.
    at_limit: "stay", or "wrap" around.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"limit": 4, "length": 16},
        "hard": {"counters": 8, "limit": 16, "length": 256},
    }

    counters: PositiveInt = 1
    limit: Annotated[int, Field(ge=2)] = 8
    length: PositiveInt = 64
    at_limit: Literal["stay", "wrap"] = "stay"

    @property
    def input_size(self) -> int:
        return self.limit + 2 * self.counters

    def symbol(self, token: int) -> str:
        """A value as its number, a step as a+ or a-, of the counter a (then b, ...)."""
        if token < self.limit:
            return str(token)
        counter, down = divmod(token - self.limit, 2)
        return f"{chr(ord('a') + counter) if counter < 26 else f'c{counter}'}{'-' if down else '+'}"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw steps: inputs and targets [batch, length] int64, all scored."""
        shape = (batch, self.length)
        inputs = torch.randint(self.limit, self.input_size, shape, generator=generator, device=device)
        shot = torch.arange(self.length, device=device).expand(batch, -1)
        return Prompt(inputs, self.values(inputs), torch.ones_like(inputs, dtype=torch.bool), shot)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """Other steps before the last one, after which its counter has another value."""
        last = prompt.inputs[:, -1:].repeat(TRIES, 1)
        tried = self.sample(len(last), generator, last.device).inputs
        tried = torch.cat([tried[:, :-1], last], 1)
        values = self.values(tried)[:, -1].view(TRIES, -1).mT
        number, there = chosen_of(values != prompt.targets[:, -1:], generator)
        rows = torch.arange(prompt.batch, device=last.device)
        inputs = torch.where(there, tried.unflatten(0, (TRIES, -1))[number.squeeze(1), rows], prompt.inputs)
        return replace(prompt, inputs=inputs, targets=self.values(inputs))

    def values(self, tokens: Tensor) -> Tensor:
        """The value of the counter that each step has moved. tokens: [B, T] int64, the steps -> [B, T] int64."""
        counters, down = ((tokens - self.limit) // 2).clamp(min=0), (tokens - self.limit) % 2
        state, values = tokens.new_zeros(len(tokens), self.counters), []
        for counter, step in zip(counters.split(1, dim=1), (1 - 2 * down).split(1, dim=1), strict=True):
            value = state.gather(1, counter) + step
            value = value.clamp(0, self.limit - 1) if self.at_limit == "stay" else value % self.limit
            state = state.scatter(1, counter, value)
            values.append(value)
        return torch.cat(values, 1)

    def learners(self) -> dict[str, Learner]:
        """`counting`, which makes no error."""
        return {"counting": Program(self.values, self.output_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then 'length=N' with twice and four times the steps."""
        return {"train": self, **{f"length={n}": self.replace(length=n) for n in (2 * self.length, 4 * self.length)}}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the values."""
        return {"accuracy": 1 / self.limit, "cross_entropy": math.log(self.limit)}
