"""Copying: the whole string, what follows some of it, only what matters of it; the induction head; the phone book."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.errors import InputError, at_most
from contextlab.learners.copying import Copier, SegmentLookup, SelectiveCopier, first_match
from contextlab.learners.ngrams import Induction
from contextlab.learners.recall import Lookup
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options


@register(
    "task", "copy", family="recall", papers=("2402.01032",), cases=({}, {"ngram": 2, "shortest": 8, "longest": 12})
)
@dataclass(frozen=True)
class Copy(TokenTask):
    """Copying a string (2402.01032): `$ string | copy`, and after its last token the end (`.`).

    With ngram > 0, that many tokens of the string stand after the bar, and the copy goes on from where they first stood
    in the string (the paper's suffix look-up; it may choose any of them, here one whose tokens stood nowhere before).
    The copy is fed back; shorter strings leave padding (`*`) at the end. A prompt is one string; the paper packs
    several. Symbols are uniform. `shot` is the number of tokens copied so far.

    vocabulary: number of symbols; the four marks have ids of their own after them.
    shortest: tokens of the shortest string.
    longest: tokens of the longest; lengths are drawn evenly.
    ngram: tokens after the bar from which the copy goes on; 0 copies the whole string.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 26, "shortest": 4, "longest": 10},
        "hard": {"vocabulary": 26, "shortest": 50, "longest": 150},
    }

    vocabulary: PositiveInt = 26
    shortest: PositiveInt = 20
    longest: PositiveInt = 50
    ngram: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.shortest > self.longest:
            raise InputError(f"shortest {self.shortest} is more than longest {self.longest}; at most {self.longest}")
        if self.ngram >= self.shortest:
            raise InputError(
                f"ngram {self.ngram} leaves nothing to copy of a string of {self.shortest}; at most {self.shortest - 1}"
            )

    @property
    def input_size(self) -> int:
        return self.vocabulary + 4

    def symbol(self, token: int) -> str:
        """Letters while they last, and the marks."""
        if token >= self.vocabulary:
            return "$|.*"[token - self.vocabulary]
        return chr(97 + token) if self.vocabulary <= 26 else str(token)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, 2 * longest + 2]. `hidden`: length [batch], of the strings."""
        size, begin, bar = self.vocabulary, self.vocabulary, self.vocabulary + 1
        width = 2 * self.longest + 2
        lengths = torch.randint(self.shortest, self.longest + 1, (batch, 1), generator=generator, device=device)
        sequence = torch.randint(size, (batch, width + 1), generator=generator, device=device)
        sequence[:, 0] = begin
        at = torch.arange(width + 1, device=device)
        start = torch.ones_like(lengths)
        if self.ngram:
            # any place that leaves a token to copy; then the first place that reads the same, so that it is the one
            uniform = torch.rand(batch, 1, generator=generator, device=device)
            most = lengths - self.ngram
            drawn = 1 + (uniform * most).long().clamp(max=most - 1)
            query = sequence.gather(1, drawn + torch.arange(self.ngram, device=device))
            start = first_match(sequence, query, drawn)
        # From the bar on, the tokens are those of the string from `start` on; the string's end stands for the end mark.
        source = start + at - lengths - 2
        ahead = at > lengths + 1
        copied = sequence.gather(1, source.clamp(0, width))
        sequence = torch.where(ahead, torch.where(source == lengths + 1, bar + 1, copied), sequence)
        sequence = torch.where(source > lengths + 1, bar + 2, sequence)
        sequence = torch.where(at == lengths + 1, bar, sequence)
        inputs, targets, at = sequence[:, :-1], sequence[:, 1:].contiguous(), at[:-1]
        inputs = torch.where(inputs == bar + 1, bar + 2, inputs)  # the end is predicted, never fed back
        done = at - lengths - 1 - self.ngram
        scored = (done >= 0) & (source[:, 1:] <= lengths + 1)
        return Prompt(inputs, targets, scored, done.clamp(min=0), hidden={"length": lengths.squeeze(1)})

    def learners(self) -> dict[str, Learner]:
        """`copier` makes no error; the n-gram look-up errs where n tokens come twice."""
        size = self.input_size
        found: dict[str, Learner] = {"copier": Copier(size, self.vocabulary + 1, self.vocabulary + 2, self.ngram)}
        for n in sorted({1, 2, 3, max(self.ngram, 1)}):
            found[f"{n}-gram_lookup"] = Induction(size, n)
        return found

    def splits(self) -> dict[str, Task]:
        """'train', and longer strings than in training, up to twice and four times its longest."""
        found: dict[str, Task] = {"train": self}
        for n in (2, 4):
            found[f"length={n * self.longest}"] = self.replace(
                shortest=n * self.longest // 2 + 1, longest=n * self.longest
            )
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among symbols and the end."""
        return {"accuracy": 1 / (self.vocabulary + 1), "cross_entropy": math.log(self.vocabulary + 1)}


@register("task", "selective_copy", family="recall", papers=("2403.17844",), cases=({"length": 48, "copies": 6}, {}))
@dataclass(frozen=True)
class SelectiveCopy(TokenTask):
    """Selective copying as in MAD (2403.17844): symbols among blanks, a marker, then blanks to copy the symbols at.

    The answers are predicted at the blanks and not fed back. Each blank of the first part is put before a random
    symbol, so the last symbol stands right before the marker. Symbols are uniform. `shot` is the number of tokens
    copied.

    vocabulary: number of symbols, the blank and the marker included.
    length: tokens in the prompt.
    copies: symbols to copy.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 16, "length": 24, "copies": 4},
        "hard": {"vocabulary": 128, "length": 1024, "copies": 96},
    }

    vocabulary: PositiveInt = 16
    length: PositiveInt = 256
    copies: PositiveInt = 16

    def __post_init__(self) -> None:
        check_options(self)
        if self.vocabulary < 4:
            raise InputError(f"vocabulary {self.vocabulary} is too small: blank, marker and 2 symbols; use 4 or more")
        if self.length <= 2 * self.copies + 1:
            raise InputError(
                f"copies {self.copies} do not fit: with the marker and a blank they take {2 * self.copies + 2} tokens, "
                f"and length is {self.length}; "
                + at_most((self.length - 2) // 2, f"use length {2 * self.copies + 2} or more")
            )

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def symbols(self) -> int:
        """Symbols that can be copied: ids 0 to symbols - 1; then the blank, then the marker."""
        return self.vocabulary - 2

    def symbol(self, token: int) -> str:
        """Symbols as numbers, a blank as _, the marker as |."""
        return str(token) if token < self.symbols else "_|"[token - self.symbols]

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]."""
        count, blank = self.copies, self.symbols
        symbols = torch.randint(self.symbols, (batch, count), generator=generator, device=device)
        blanks = self.length - 2 * count - 1
        gaps = torch.randint(count, (batch, blanks), generator=generator, device=device)
        before = torch.zeros(batch, count, dtype=torch.int64, device=device)
        before = before.scatter_add_(1, gaps, torch.ones_like(gaps)).cumsum(1)
        inputs = torch.full((batch, self.length), blank, device=device)
        inputs.scatter_(1, torch.arange(count, device=device) + before, symbols)
        inputs[:, -count - 1] = blank + 1
        targets = torch.zeros_like(inputs)
        targets[:, -count:] = symbols
        scored = torch.zeros_like(inputs, dtype=torch.bool)
        scored[:, -count:] = True
        shot = (torch.arange(self.length, device=device) - self.length + count).clamp(min=0).expand(batch, -1)
        return Prompt(inputs, targets, scored, shot)

    def learners(self) -> dict[str, Learner]:
        """`selective_copier`, which makes no error."""
        return {"selective_copier": SelectiveCopier(self.vocabulary, self.symbols, self.symbols + 1)}

    def splits(self) -> dict[str, Task]:
        """'train', more blanks between as many symbols, and more symbols among as many blanks."""
        longer, more = 2 * self.length, 2 * self.copies
        return {
            "train": self,
            f"length={longer}": self.replace(length=longer),
            f"copies={more}": self.replace(copies=more, length=self.length + 2 * self.copies),
        }

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the symbols."""
        return {"accuracy": 1 / self.symbols, "cross_entropy": math.log(self.symbols)}


@register(
    "task",
    "induction_head",
    family="recall",
    papers=("2312.00752",),
    cases=({"length": 64}, {"length": 32, "trigger": "any"}),
)
@dataclass(frozen=True)
class InductionHead(TokenTask):
    """The induction head's task, as for Mamba (2312.00752): what followed the trigger, when it comes again.

    Random symbols, among them the trigger once; the trigger again is the last token, at which alone a prediction
    counts. `shot` is 1 there.

    vocabulary: number of symbols.
    length: tokens in the prompt.
    trigger: "special" is a symbol of its own (id `vocabulary`), "any" one of the symbols, drawn anew for each prompt.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 8, "length": 24},
        "hard": {"vocabulary": 64, "length": 1024, "trigger": "any"},
    }

    vocabulary: PositiveInt = 16
    length: PositiveInt = 256
    trigger: Literal["special", "any"] = "special"

    def __post_init__(self) -> None:
        check_options(self)
        if self.length < 3:
            raise InputError(
                f"length {self.length} has no room for the trigger, a token and the trigger; use 3 or more"
            )
        if self.vocabulary < 3:
            raise InputError(f"vocabulary {self.vocabulary} leaves nothing to predict; use 3 or more")

    @property
    def input_size(self) -> int:
        return self.vocabulary + (self.trigger == "special")

    def symbol(self, token: int) -> str:
        """Symbols as numbers, a trigger of its own as !."""
        return "!" if token == self.vocabulary else str(token)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]. `hidden`: at [batch], the place of the first trigger."""
        place = torch.randint(self.length - 2, (batch, 1), generator=generator, device=device)
        if self.trigger == "special":
            key = torch.full((batch, 1), self.vocabulary, device=device)
            inputs = torch.randint(self.vocabulary, (batch, self.length), generator=generator, device=device)
        else:
            key = torch.randint(self.vocabulary, (batch, 1), generator=generator, device=device)
            inputs = torch.randint(self.vocabulary - 1, (batch, self.length), generator=generator, device=device)
            inputs = inputs + (inputs >= key)  # all other symbols
        inputs.scatter_(1, place, key)
        inputs[:, -1:] = key
        targets = torch.zeros_like(inputs)
        targets[:, -1:] = inputs.gather(1, place + 1)
        scored = torch.zeros_like(inputs, dtype=torch.bool)
        scored[:, -1] = True
        shot = (torch.arange(self.length, device=device) > place).long()
        return Prompt(inputs, targets, scored, shot, hidden={"at": place.squeeze(1)})

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "distance": tokens from the first trigger to the second."""
        assert prompt.hidden is not None
        found = super().facets(prompt)
        return {**found, "distance": (found["position"] - prompt.hidden["at"].unsqueeze(1)).clamp_min(0)}

    def learners(self) -> dict[str, Learner]:
        """`induction`, which makes no error."""
        return {"induction": Induction(self.input_size), "lookup": Lookup(self.input_size)}

    def splits(self) -> dict[str, Task]:
        """'train', and 2, 4 and 16 times the tokens."""
        longer = {f"length={n * self.length}": self.replace(length=n * self.length) for n in (2, 4, 16)}
        return {"train": self, **longer}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the symbols that can follow."""
        choices = self.vocabulary - (self.trigger == "any")
        return {"accuracy": 1 / choices, "cross_entropy": math.log(choices)}


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
        """Guessing evenly among 6 to 9 for the first digit, and among all ten for the others."""
        rest = self.digits - 1
        return {
            "accuracy": (1 / 4 + rest / 10) / self.digits,
            "cross_entropy": (math.log(4) + rest * math.log(10)) / self.digits,
        }
