"""A phonebook: the number of a name that stands in the context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.copying import SegmentLookup
from contextlab.learners.ngrams import Induction
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import chosen_of


@register("task", "phonebook", family="recall", papers=("2402.01032",), cases=({"entries": 6, "digits": 4}, {}))
@dataclass(frozen=True)
class Phonebook(TokenTask):
    """The phone book (2402.01032): names with numbers, two of them again as examples, then a name without its number.

    An entry is a first name, a last name, a colon, the digits and a line's end; empty lines stand before and after the
    examples. The paper writes the same as text for pretrained models; here a name is two tokens. No name is in two
    entries; the first digit is 6 to 9. The digits of the answer are fed back. `shot` is the number of entries.

    entries: names with numbers.
    digits: of each number.
    names: first names, and as many last names.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"entries": 4, "digits": 3, "names": 8},
        "hard": {"entries": 70, "digits": 10, "names": 32},
    }

    entries: PositiveInt = 20
    digits: PositiveInt = 10
    names: PositiveInt = 16

    def __post_init__(self) -> None:
        check_options(self)
        if self.entries < 3:
            raise InputError(f"entries {self.entries} are too few for two examples and a question; use 3 or more")
        if self.entries > (most := self.names**2):
            raise InputError(
                f"entries {self.entries} do not fit: {self.names} first and last names make {most}; at most {most}"
            )

    @property
    def input_size(self) -> int:
        return 2 * self.names + 12

    @property
    def ids(self) -> tuple[int, int, int]:
        """Of the digit 0, the colon and the line's end; before them, first and last names."""
        return 2 * self.names, 2 * self.names + 10, 2 * self.names + 11

    def symbol(self, token: int) -> str:
        """Names as F0, L0, ...; digits, the colon and the line's end as they are."""
        zero, _, _ = self.ids
        if token >= zero:
            return "0123456789:\n"[token - zero]
        return f"F{token}" if token < self.names else f"L{token - self.names}"

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The book as it reads, and the number that is asked for in brackets."""
        last = prompt.length - self.digits + 1
        read, asked = prompt.inputs[row, :last].tolist(), prompt.targets[row, last - 1 :].tolist()
        book = "".join(self.symbol(token) + " " * (token < self.names) for token in read)
        return f"{book} [{''.join(map(self.symbol, asked))}]"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, (entries + 3) * (digits + 4)]. `hidden`: entry [batch], the one asked for."""
        zero, colon, end = self.ids
        pairs = torch.rand(batch, self.names**2, generator=generator, device=device)
        chosen = pairs.topk(self.entries, dim=1).indices
        uniform = torch.rand(batch, self.entries, generator=generator, device=device)
        numbers = torch.randint(10, (batch, self.entries, self.digits), generator=generator, device=device)
        numbers[..., 0] = torch.randint(6, 10, (batch, self.entries), generator=generator, device=device)
        book = torch.empty(batch, self.entries, self.digits + 4, dtype=torch.int64, device=device)
        book[..., 0] = chosen // self.names
        book[..., 1] = self.names + chosen % self.names
        book[..., 2] = colon
        book[..., 3:-1] = zero + numbers
        book[..., -1] = end
        three = uniform.topk(3, dim=1).indices.unsqueeze(-1).expand(-1, -1, self.digits + 4)
        shown = book.gather(1, three)
        line = torch.full((batch, 1), end, device=device)
        sequence = torch.cat([book.flatten(1), line, shown[:, :2].flatten(1), line, shown[:, 2, :-1]], 1)
        inputs, targets = sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous()
        scored = torch.zeros_like(inputs, dtype=torch.bool)
        scored[:, -self.digits :] = True
        shot = torch.arange(1, inputs.shape[1] + 1, device=device) // (self.digits + 4)
        return Prompt(
            inputs, targets, scored, shot.clamp(max=self.entries).expand(batch, -1), hidden={"entry": three[:, 2, 0]}
        )

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The number that is asked for has another last digit."""
        assert prompt.hidden is not None
        low = self.ids[0] + (6 if self.digits == 1 else 0)
        digits = torch.arange(low, self.ids[0] + 10, device=prompt.inputs.device)
        new = low + chosen_of(digits != prompt.targets[:, -1:], generator)[0]
        place = (prompt.hidden["entry"] * (self.digits + 4) + self.digits + 2).unsqueeze(1)
        inputs = prompt.inputs.scatter(1, place, new)
        return replace(prompt, inputs=inputs, targets=torch.cat([inputs[:, 1:], new], 1))

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "digit" of the number, from 0, and "distance": tokens from the asked entry to the question."""
        assert prompt.hidden is not None
        found = super().facets(prompt)
        start = prompt.length - self.digits
        distance = start - 2 - prompt.hidden["entry"] * (self.digits + 4)
        digit = (found["position"] - start).clamp_min(0)
        return {**found, "digit": digit, "distance": distance.unsqueeze(1).expand_as(digit)}

    def learners(self) -> dict[str, Learner]:
        """`segment_lookup` makes no error; look-ups by the last tokens only mistake one number for another."""
        size = self.input_size
        found: dict[str, Learner] = {"segment_lookup": SegmentLookup(size, 2 * self.names)}
        for n in (2, 4):
            found[f"{n}-gram_lookup"] = Induction(size, n)
        return found

    def splits(self) -> dict[str, Task]:
        """'train', and twice and four times the entries, as far as the names go."""
        found: dict[str, Task] = {"train": self}
        for n in (2, 4):
            if n * self.entries <= self.names**2:
                found[f"entries={n * self.entries}"] = self.replace(entries=n * self.entries)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among 6 to 9 for the first digit, and among all ten for the others."""
        rest = self.digits - 1
        return {
            "accuracy": (1 / 4 + rest / 10) / self.digits,
            "cross_entropy": (math.log(4) + rest * math.log(10)) / self.digits,
        }
