"""Formal languages: regular (Tomita), nested (Dyck) and counting (a^n b^n), by next symbols or by membership."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask
from contextlab.tasks.formal_languages import Language, language_of

CHANGES = 3
"""Most symbols that are drawn anew in a string whose membership is asked for."""

Name = Literal[
    "tomita1", "tomita2", "tomita3", "tomita4", "tomita5", "tomita6", "tomita7", "dyck", "anbn", "anbncn"
]  # fmt: skip


@register(
    "task",
    "formal_language",
    family="languages",
    papers=("2009.11264", "2405.17394"),
    cases=(
        {"language": "tomita3", "longest": 16},
        {"language": "dyck", "longest": 12, "depth": 3},
        {"language": "anbncn", "longest": 12, "ask": "membership"},
    ),
)
@dataclass(frozen=True)
class FormalLanguage(TokenTask):
    """Strings of a formal language: after each symbol, which symbols may follow; or at the end, is it a member.

    "tomita1" 1*; "tomita2" (10)*; "tomita3" no odd run of 0 anywhere after an odd run of 1; "tomita4" no 000;
    "tomita5" even numbers of 0 and of 1; "tomita6" as many 0 as 1, modulo 3; "tomita7" 0*1*0*1*; "dyck"
    well-nested brackets; "anbn" and "anbncn" each letter n > 0 times. The length is uniform among those in
    range that strings have, and the string is uniform among those of its length. `shot` is the number of symbols
    read.

    Asked for "next", the answer at each position is the set of what may follow, the end ($) among it; each set is one
    answer id. Regular and counter languages as in 2009.11264, which has others of them. Asked for "membership",
    half the strings have 1 to 3 of their symbols drawn anew, and the answer stands at the last symbol.

    language: which.
    types: kinds of brackets (dyck).
    depth: deepest nesting (dyck); deeper strings are not in the language.
    shortest: fewest symbols of a string.
    longest: most symbols of a string; a prompt has one token more.
    ask: "next" or "membership".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"language": "tomita4", "longest": 20},
        "hard": {"language": "dyck", "types": 4, "depth": 12, "shortest": 32, "longest": 128},
    }

    language: Name = "dyck"
    types: PositiveInt = 2
    depth: PositiveInt = 6
    shortest: PositiveInt = 2
    longest: Annotated[int, Field(gt=0, le=100_000)] = 40
    ask: Literal["next", "membership"] = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.types > 4:
            raise InputError(f"types {self.types} are too many: there are 4 kinds of brackets; at most 4")
        if self.shortest > self.longest:
            raise InputError(f"shortest {self.shortest} is more than longest {self.longest}; at most {self.longest}")
        if not self._lengths():
            raise InputError(
                f"no string of {self.language} has {self.shortest} to {self.longest} symbols; use longest "
                f"{next(n for n in range(self.longest + 1, self.longest + 4) if self._has(n))}"
            )

    @property
    def its(self) -> Language:
        """The language."""
        return language_of(self.language, self.types, self.depth)

    def _has(self, length: int) -> bool:
        return bool(self.its.counts(length)[length] > 0)

    def _lengths(self) -> list[int]:
        counts = self.its.counts(self.longest)
        return [n for n in range(self.shortest, self.longest + 1) if counts[n] > 0]

    @property
    def answers(self) -> list[str]:
        """What can be answered, as text; the ids begin after the symbols, the start ^ and the end $."""
        if self.ask == "membership":
            return ["no", "yes"]
        shown = [*self.its.symbols, "$"]
        return ["{" + "".join(s for i, s in enumerate(shown) if bits >> i & 1) + "}" for bits in self.its.sets()]

    @property
    def input_size(self) -> int:
        return len(self.its.symbols) + 2 + len(self.answers)

    def symbol(self, token: int) -> str:
        """A symbol, ^ before the string, $ after it, or an answer."""
        return [*self.its.symbols, "^", "$", *self.answers][token]

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts of longest + 1 tokens."""
        size = len(self.its.symbols)
        possible = torch.tensor(self._lengths(), device=device)
        length = possible[torch.randint(len(possible), (batch,), generator=generator, device=device)]
        strings = self.its.draw(length, self.longest, generator)
        if self.ask == "membership":
            strings = self._change(strings, length, generator)
        at = torch.arange(self.longest + 1, device=device).expand(batch, -1)
        scored = at == length.unsqueeze(1) if self.ask == "membership" else at <= length.unsqueeze(1)
        start = torch.full_like(strings[:, :1], size)
        inputs = torch.cat([start, torch.where(at[:, 1:] <= length.unsqueeze(1), strings, size + 1)], 1)
        return Prompt(inputs, self._answers(inputs), scored, at.clone())

    def _change(self, strings: Tensor, length: Tensor, generator: torch.Generator) -> Tensor:
        """Half the strings with 1 to CHANGES symbols drawn anew."""
        shape, size = (len(strings), CHANGES), len(self.its.symbols)
        uniform = torch.rand(*shape, generator=generator, device=strings.device)
        at = (uniform * length.unsqueeze(1)).long().minimum(length.unsqueeze(1) - 1)
        drawn = torch.randint(size, shape, generator=generator, device=strings.device)
        # 0 changes for half of the strings, else 1 to CHANGES; a change that is not made writes what stands there
        number = torch.randint(-CHANGES, CHANGES, (len(strings), 1), generator=generator, device=strings.device) + 1
        for i in range(CHANGES):
            place = at[:, i : i + 1]
            symbol = torch.where(number > i, drawn[:, i : i + 1], strings.gather(1, place))
            strings = strings.scatter(1, place, symbol)
        return strings

    def _answers(self, tokens: Tensor) -> Tensor:
        """The answer id at each position [B, T]; positions after the string's end have any."""
        size = len(self.its.symbols)
        may = self.its.follow(tokens[:, 1:].clamp(max=size - 1))
        if self.ask == "membership":
            return may[..., -1].long() + size + 2
        bits = (may.long() << torch.arange(size + 1, device=tokens.device)).sum(-1)
        order = torch.tensor(self.its.sets(), device=tokens.device)
        ranked, place = order.sort()
        return place[torch.searchsorted(ranked, bits)] + size + 2

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, the language's own machine (an automaton, a stack or counters), which makes no error."""
        return {"evaluator": Program(self._answers, self.input_size)}

    def splits(self) -> dict[str, Task]:
        """'train', 'longer' (up to twice the length), and for dyck 'deeper' (twice the depth)."""
        found: dict[str, Task] = {
            "train": self,
            "longer": self.replace(shortest=self.longest + 1, longest=max(2 * self.longest, self.longest + 3)),
        }
        if self.language == "dyck":
            found["deeper"] = self.replace(depth=2 * self.depth)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the answers."""
        return {"accuracy": 1 / len(self.answers), "cross_entropy": math.log(len(self.answers))}
