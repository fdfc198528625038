"""Copying: the whole string, what follows some of it, only what matters of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt

from contextlab.errors import InputError, at_most
from contextlab.learners.copying import Copier, SelectiveCopier, first_match
from contextlab.learners.ngrams import Induction
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import exchange_answers


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
    longest: tokens of the longest; lengths are drawn uniformly.
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

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The last symbol that is copied, where it is another than the token before, and any other exchanged."""
        return exchange_answers(prompt, generator, 0, self.vocabulary)[0]

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
        """Guessing uniformly among symbols and the end."""
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

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The last symbol that is copied and any other in each other's places."""
        return exchange_answers(prompt, generator, 0, self.symbols)[0]

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
        """Guessing uniformly among the symbols."""
        return {"accuracy": 1 / self.symbols, "cross_entropy": math.log(self.symbols)}
