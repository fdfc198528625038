"""MAD's fuzzy in-context recall (2403.17844): keys and values of one to three symbols."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, at_most
from contextlab.learners.copying import SegmentLookup
from contextlab.learners.ngrams import Induction, last_seen
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import exchange_answers


@register(
    "task", "mad_fuzzy_recall", family="recall", papers=("2403.17844",), cases=({}, {"key_tokens": 2, "vocabulary": 24})
)
@dataclass(frozen=True)
class MadFuzzyRecall(TokenTask):
    """MAD's fuzzy in-context recall: keys and values of one to several tokens, scored wherever a key comes again.

    A key is a sequence without repetition of 1 to `key_tokens` key symbols, its length drawn first, evenly; a value
    likewise. In a prompt a key keeps its value. The prompt ends with a key that has been shown and its value, whose
    last token is a target only; padding (`_`) fills the prompt from the left. All tokens of a repeated key's value are
    scored, the first at the key's last token. Where the authors may fail to show the asked key before, it is shown
    here. `shot` is the number of pairs before.

    vocabulary: number of symbols, the padding included; half of the others are keys, half are values.
    length: tokens in the prompt.
    key_tokens: of the longest key.
    value_tokens: of the longest value.
    keys_drawn: "any" length up to `key_tokens`, or the "longest" only, as the authors test.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 12, "length": 48, "key_tokens": 2, "value_tokens": 2},
        "hard": {"vocabulary": 128, "length": 1024},
    }

    vocabulary: PositiveInt = 16
    length: PositiveInt = 128
    key_tokens: PositiveInt = 3
    value_tokens: PositiveInt = 3
    keys_drawn: Literal["any", "longest"] = "any"

    def __post_init__(self) -> None:
        check_options(self)
        for name, most, symbols in (("key", self.key_tokens, self.keys), ("value", self.value_tokens, self.values)):
            if most > symbols:
                raise InputError(
                    f"{name}_tokens {most} do not fit: vocabulary {self.vocabulary} holds {symbols} {name} symbols; "
                    + at_most(symbols, "use a larger vocabulary")
                )
        if self.key_tokens * math.log2(self.keys + 1) > 62:
            most = int(62 / math.log2(self.keys + 1))
            raise InputError(f"key_tokens {self.key_tokens} are too many for {self.keys} key symbols; at most {most}")
        if self.length <= 2 * (self.key_tokens + self.value_tokens):
            least = 2 * (self.key_tokens + self.value_tokens) + 1
            raise InputError(f"length {self.length} is too short for two pairs of the longest; use {least} or more")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def keys(self) -> int:
        """Symbols of keys: ids 0 to keys - 1."""
        return (self.vocabulary - 1) // 2

    @property
    def values(self) -> int:
        """Symbols of values, after those of keys; the padding is the last id."""
        return self.vocabulary - 1 - self.keys

    def symbol(self, token: int) -> str:
        """Key symbols as k0, k1, ..., value symbols as v0, v1, ..., the padding as _."""
        if token == self.vocabulary - 1:
            return "_"
        return f"k{token}" if token < self.keys else f"v{token - self.keys}"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]."""
        longest = self.key_tokens + self.value_tokens
        most = (self.length + 1) // 2  # a pair has two tokens at least
        # Entry 0 is the pair that is asked for; the others are those before it.
        shortest = self.key_tokens if self.keys_drawn == "longest" else 1
        keys, key_size = self._motifs(batch, most + 1, self.keys, shortest, self.key_tokens, generator, device)
        values, value_size = self._motifs(batch, most + 1, self.values, 1, self.value_tokens, generator, device)
        values = values + self.keys
        uniform = torch.rand(batch, 1, generator=generator, device=device)

        # The asked pair takes the place of the first pair that begins at a random token or after it, as long as it has
        # not come up by itself; it is the last place at the latest.
        asked = key_size[:, :1] + value_size[:, :1]
        limit = self.length - asked - longest  # pairs begin before
        wanted = (uniform * (self.length - 2 * asked)).long()
        first = _first_equal(self._codes(keys, key_size))
        sizes = key_size[:, 1:] + value_size.gather(1, first)[:, 1:]
        begin = F.pad(sizes.cumsum(1)[:, :-1], (1, 0))
        last = (begin < limit).sum(1, keepdim=True) - 1
        place = (begin < wanted).sum(1, keepdim=True).minimum(last)
        number = torch.arange(most, device=device)
        there = ((first[:, 1:] == 0) & (number < place)).any(1, keepdim=True)
        source = F.pad(torch.where((number == place) & ~there, 0, number + 1), (1, 0))
        keys, key_size = keys.gather(1, source.unsqueeze(2).expand_as(keys)), key_size.gather(1, source)

        codes = self._codes(keys, key_size)
        first = _first_equal(codes)
        values, value_size = values.gather(1, first.unsqueeze(2).expand_as(values)), value_size.gather(1, first)
        begin = F.pad((key_size + value_size)[:, 1:].cumsum(1)[:, :-1], (1, 0))
        used = begin < limit
        repeated = last_seen(codes[:, 1:]) >= 0
        end = ((key_size + value_size)[:, 1:] * used).sum(1, keepdim=True)
        # The asked pair last, and everything as far to the right as it goes: one token more than the prompt has.
        begin = torch.cat([end, begin], 1) + self.length + 1 - end - asked
        used, repeated = (F.pad(each, (1, 0), value=True) for each in (used, repeated))
        wide = self.length + 2  # the last place takes what is not written
        sequence = torch.full((batch, wide), self.vocabulary - 1, device=device)
        scored = torch.zeros(batch, wide, dtype=torch.bool, device=device)
        pairs = torch.zeros(batch, wide, dtype=torch.int64, device=device)
        for tokens, size, start in ((keys, key_size, begin), (values, value_size, begin + key_size)):
            step = torch.arange(tokens.shape[2], device=device)
            written = (step < size.unsqueeze(2)) & used.unsqueeze(2)
            at = torch.where(written, start.unsqueeze(2) + step, wide - 1).flatten(1)
            sequence.scatter_(1, at, tokens.flatten(1))
            if tokens is values:
                scored.scatter_(1, at, repeated.unsqueeze(2).expand_as(tokens).flatten(1))
        pairs.scatter_(1, torch.where(used, begin, wide - 1), 1)
        sequence, scored = sequence[:, :-1], scored[:, 1:-1].contiguous()
        shot = (pairs.cumsum(1)[:, : self.length] - 1).clamp(min=0)
        return Prompt(sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous(), scored, shot)

    @staticmethod
    def _motifs(
        batch: int,
        count: int,
        symbols: int,
        shortest: int,
        longest: int,
        generator: torch.Generator,
        device: torch.device | str,
    ) -> tuple[Tensor, Tensor]:
        """Sequences without repetition [batch, count, longest], and how many tokens of each are used."""
        size = torch.randint(shortest, longest + 1, (batch, count), generator=generator, device=device)
        chosen = torch.empty(batch, count, 0, dtype=torch.int64, device=device)
        for step in range(longest):
            token = torch.randint(symbols - step, (batch, count), generator=generator, device=device)
            for other in chosen.sort(dim=2).values.unbind(2):  # count past those that are taken, in their order
                token = token + (token >= other)
            chosen = torch.cat([chosen, token.unsqueeze(2)], 2)
        return chosen, size

    def _codes(self, keys: Tensor, size: Tensor) -> Tensor:
        """A number for each key, [batch, count]."""
        step = torch.arange(self.key_tokens, device=keys.device)
        digits = torch.where(step < size.unsqueeze(2), keys + 1, 0)
        return (digits * (self.keys + 1) ** step).sum(2)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The last answer and another value symbol in each other's places."""
        return exchange_answers(prompt, generator, self.keys, self.keys + self.values)[0]

    def learners(self) -> dict[str, Learner]:
        """`segment_lookup` makes no error; look-ups by the last tokens take a part of a key for the whole."""
        size = self.vocabulary
        found: dict[str, Learner] = {"segment_lookup": SegmentLookup(size, self.keys)}
        for n in (1, 3):
            found[f"{n}-gram_lookup"] = Induction(size, n)
        return found

    def splits(self) -> dict[str, Task]:
        """'train', only the longest keys, and twice and four times the tokens."""
        found: dict[str, Task] = {"train": self, "longest_keys": self.replace(keys_drawn="longest")}
        for n in (2, 4):
            found[f"length={n * self.length}"] = self.replace(length=n * self.length)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the value symbols."""
        return {"accuracy": 1 / self.values, "cross_entropy": math.log(self.values)}


def _first_equal(codes: Tensor) -> Tensor:
    """The index of the first equal number in each row, [batch, count]."""
    ordered, order = codes.sort(dim=1, stable=True)
    place = torch.arange(codes.shape[1], device=codes.device)
    new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    begin = torch.where(new, place, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))
