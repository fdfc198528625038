"""The tasks of MAD (mechanistic architecture design, 2403.17844), after the authors' generator.

Selective copying, the sixth, is selective_copy. The authors train on every next token of the recall tasks and test only
on what can be known; here only that is scored, in training too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, at_most
from contextlab.learners.copying import MemorizedPairs, PerfectMemory, SegmentLookup
from contextlab.learners.ngrams import Induction, last_seen
from contextlab.learners.recall import Lookup
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options

Share = Annotated[float, Field(ge=0, lt=1)]


@register(
    "task",
    "mad_recall",
    family="recall",
    papers=("2403.17844",),
    cases=({}, {"noise": 0.5, "noise_symbols": 4, "length": 40}),
)
@dataclass(frozen=True)
class MadRecall(TokenTask):
    """MAD's in-context recall: pairs of random keys and their values, scored wherever a key comes again.

    The values of a prompt's keys are uniform, so two keys may have the same one. Pairs follow each other; the last has
    a key that has been shown. A pair is replaced by two noise symbols with probability `noise`, but for one of all. The
    last value is a target only, so the prompt has length - 1 tokens. `shot` is the number of pairs before.

    vocabulary: number of symbols, noise included; half of the others are keys, half are values.
    length: tokens of all pairs.
    noise: share of the pairs that are noise.
    noise_symbols: symbols of noise, the highest ids.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 16, "length": 32},
        "hard": {"vocabulary": 128, "length": 1024},
    }

    vocabulary: PositiveInt = 16
    length: PositiveInt = 128
    noise: Share = 0.0
    noise_symbols: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.length % 2 or self.length < 4:
            raise InputError(f"length {self.length} is not an even number of at least 4; use {max(4, self.length + 1)}")
        if self.vocabulary < self.noise_symbols + 4:
            raise InputError(
                f"vocabulary {self.vocabulary} is too small for {self.noise_symbols} symbols of noise, 2 keys and 2 "
                f"values; use {self.noise_symbols + 4} or more"
            )
        if self.noise and not self.noise_symbols:
            raise InputError(f"noise {self.noise} needs symbols of its own; set noise_symbols to 1 or more")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def keys(self) -> int:
        """Symbols that are keys: ids 0 to keys - 1."""
        return (self.vocabulary - self.noise_symbols) // 2

    @property
    def values(self) -> int:
        """Symbols that are values, after the keys; noise comes last."""
        return self.vocabulary - self.noise_symbols - self.keys

    def symbol(self, token: int) -> str:
        """Keys as k0, k1, ..., values as v0, v1, ..., noise as ~."""
        if token >= self.keys + self.values:
            return "~"
        return f"k{token}" if token < self.keys else f"v{token - self.keys}"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length - 1]."""
        pairs = self.length // 2
        bound = torch.randint(self.values, (batch, self.keys), generator=generator, device=device) + self.keys
        keys = torch.randint(self.keys, (batch, pairs), generator=generator, device=device)
        noise = torch.zeros(batch, pairs, dtype=torch.bool, device=device)
        if self.noise:
            noise = torch.rand(batch, pairs, generator=generator, device=device) < self.noise
            spared = torch.randint(pairs - 1, (batch, 1), generator=generator, device=device)
            noise.scatter_(1, spared, False)
            noise[:, -1] = False
        # The last key is any that has been shown: the one with the largest of random numbers.
        shown = torch.zeros(batch, self.keys, device=device)
        shown.scatter_add_(1, keys[:, :-1], (~noise[:, :-1]).float())
        uniform = torch.rand(batch, self.keys, generator=generator, device=device)
        keys[:, -1] = uniform.masked_fill(shown == 0, -1).argmax(1)
        seen = last_seen(keys.masked_fill(noise, -1)) >= 0
        sequence = torch.stack([keys, bound.gather(1, keys)], 2)
        if self.noise:
            first = self.keys + self.values
            filler = torch.randint(first, self.vocabulary, sequence.shape, generator=generator, device=device)
            sequence = torch.where(noise.unsqueeze(2), filler, sequence)
        sequence = sequence.flatten(1)
        scored = torch.stack([seen, torch.zeros_like(seen)], 2).flatten(1)[:, :-1].contiguous()
        shot = (torch.arange(self.length - 1, device=device) // 2).expand(batch, -1)
        return Prompt(sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous(), scored, shot)

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "distance": tokens since the key was shown last."""
        found = super().facets(prompt)
        return {**found, "distance": found["position"] - last_seen(prompt.inputs)}

    def learners(self) -> dict[str, Learner]:
        """`lookup`, which makes no error."""
        return {"lookup": Lookup(self.vocabulary)}

    def splits(self) -> dict[str, Task]:
        """'train', twice and four times the pairs; with noise, none of it, and more."""
        found: dict[str, Task] = {"train": self}
        for n in (2, 4):
            found[f"length={n * self.length}"] = self.replace(length=n * self.length)
        if self.noise:
            for noise in (0.0, 0.4, 0.8):
                found[f"noise={noise:g}"] = self.replace(noise=noise)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the values."""
        return {"accuracy": 1 / self.values, "cross_entropy": math.log(self.values)}


@register("task", "mad_noisy_recall", family="recall", papers=("2403.17844",), cases=({}, {"noise": 0.8, "length": 40}))
@dataclass(frozen=True)
class MadNoisyRecall(MadRecall):
    """MAD's noisy in-context recall: its recall, where some pairs are two symbols of noise instead.

    vocabulary: number of symbols, noise included; half of the others are keys, half are values.
    length: tokens of all pairs.
    noise: share of the pairs that are noise.
    noise_symbols: symbols of noise, the highest ids.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 20, "noise_symbols": 4, "length": 32},
        "hard": {"vocabulary": 144, "length": 1024, "noise": 0.8},
    }

    vocabulary: PositiveInt = 32
    noise: Share = 0.2
    noise_symbols: NonNegativeInt = 16


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
        """Guessing evenly among the value symbols."""
        return {"accuracy": 1 / self.values, "cross_entropy": math.log(self.values)}


def _first_equal(codes: Tensor) -> Tensor:
    """The index of the first equal number in each row, [batch, count]."""
    ordered, order = codes.sort(dim=1, stable=True)
    place = torch.arange(codes.shape[1], device=codes.device)
    new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    begin = torch.where(new, place, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))


@register(
    "task", "mad_memorization", family="recall", papers=("2403.17844",), cases=({}, {"vocabulary": 17, "length": 8})
)
@dataclass(frozen=True)
class MadMemorization(TokenTask):
    """MAD's memorization: each key has one value in all prompts, which none of them shows; it must be learned.

    A prompt is key, insert mark (`?`), key, insert mark, ...; at a mark the value of the key before it is predicted.
    The table, by `seed`, gives the keys different values. There is nothing to learn in context, and no split has other
    facts. `shot` is 0.

    vocabulary: number of symbols; the highest is the mark, half of the others are keys, half are values.
    length: tokens in the prompt.
    seed: of the table.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 32, "length": 16},
        "hard": {"vocabulary": 8192, "length": 32},
    }

    vocabulary: PositiveInt = 256
    length: PositiveInt = 32
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.vocabulary < 5:
            raise InputError(f"vocabulary {self.vocabulary} is too small: a mark, 2 keys and 2 values; use 5 or more")
        if self.length % 2:
            raise InputError(f"length {self.length} is odd; a key and a mark take two tokens: use {self.length + 1}")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def keys(self) -> int:
        """Symbols that are keys: ids 0 to keys - 1. The values are keys to vocabulary - 2."""
        return (self.vocabulary - 1) // 2

    def symbol(self, token: int) -> str:
        """Keys as k0, k1, ..., values as v0, v1, ..., the mark as ?."""
        if token == self.vocabulary - 1:
            return "?"
        return f"k{token}" if token < self.keys else f"v{token - self.keys}"

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The value of each symbol, [vocabulary] int64; -1 for all but keys."""
        return _facts(self.vocabulary, self.keys, self.seed).to(device)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]."""
        keys = torch.randint(self.keys, (batch, self.length // 2), generator=generator, device=device)
        inputs = torch.stack([keys, torch.full_like(keys, self.vocabulary - 1)], 2).flatten(1)
        targets = torch.stack([torch.zeros_like(keys), self.table(device)[keys]], 2).flatten(1)
        scored = (torch.arange(self.length, device=device) % 2 == 1).expand(batch, -1).contiguous()
        return Prompt(inputs, targets, scored, torch.zeros_like(inputs))

    def learners(self) -> dict[str, Learner]:
        """The table itself, as weights would hold it."""
        return {"memorized_pairs": MemorizedPairs(self.vocabulary, self.table())}

    def splits(self) -> dict[str, Task]:
        """'train', and twice the tokens."""
        return {"train": self, f"length={2 * self.length}": self.replace(length=2 * self.length)}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the values."""
        values = self.vocabulary - 1 - self.keys
        return {"accuracy": 1 / values, "cross_entropy": math.log(values)}


@lru_cache(maxsize=16)
def _facts(vocabulary: int, keys: int, seed: int) -> Tensor:
    """Drawn on the CPU, so that it is the same on every device."""
    values = torch.randperm(vocabulary - 1 - keys, generator=torch.Generator().manual_seed(seed))[:keys]
    return torch.full((vocabulary,), -1).index_copy_(0, torch.arange(keys), keys + values)


@register("task", "mad_compression", family="recall", papers=("2403.17844",), cases=({}, {"length": 8}))
@dataclass(frozen=True)
class MadCompression(TokenTask):
    """MAD's compression: random symbols, then a mark (`|`) at which all of them are told from one vector.

    A prediction is length - 1 distributions, those of one place after those of another; it is scored at the mark only.
    A model's read-out takes the place of the authors' decoder, a network of two layers that is given each place; so
    what is measured is what the last vector holds, linearly. They score the mark, too, which is always the same. The
    errors are means over the places. `shot` is the number of symbols read.

    vocabulary: number of symbols, the mark included.
    length: tokens in the prompt, the mark included.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 8, "length": 8},
        "hard": {"vocabulary": 32, "length": 64},
    }

    vocabulary: PositiveInt = 16
    length: PositiveInt = 32

    def __post_init__(self) -> None:
        check_options(self)
        if self.vocabulary < 3:
            raise InputError(f"vocabulary {self.vocabulary} is too small: a mark and 2 symbols; use 3 or more")
        if self.length < 2:
            raise InputError(f"length {self.length} has no symbol before the mark; use 2 or more")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def output_size(self) -> int:
        return (self.length - 1) * self.vocabulary

    def symbol(self, token: int) -> str:
        """Symbols as numbers, the mark as |."""
        return "|" if token == self.vocabulary - 1 else str(token)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The tokens, and that all of them are asked for."""
        tokens = " ".join(self.symbol(token) for token in prompt.inputs[row].tolist())
        return f"{tokens}[all of them, in order]"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]. `targets` are the inputs: what is told is the whole prompt."""
        inputs = torch.randint(self.vocabulary - 1, (batch, self.length), generator=generator, device=device)
        inputs[:, -1] = self.vocabulary - 1
        at = torch.arange(self.length, device=device).expand(batch, -1)
        return Prompt(inputs, inputs.clone(), at == self.length - 1, at)

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross-entropy in nats over the places, at the mark. prediction: [B, T, output_size]."""
        told = prediction[:, -1].float().unflatten(-1, (self.length - 1, self.vocabulary))
        return F.cross_entropy(told.flatten(0, 1), prompt.targets[:, :-1].flatten())

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy and cross_entropy in nats, means over the places, [B, T]."""
        told = prediction.float().unflatten(-1, (self.length - 1, self.vocabulary))
        wanted = prompt.targets[:, None, :-1].expand(told.shape[:3])
        return {
            "accuracy": (told.argmax(-1) == wanted).float().mean(-1),
            "cross_entropy": F.cross_entropy(told.permute(0, 3, 1, 2), wanted, reduction="none").mean(-1),
        }

    def learners(self) -> dict[str, Learner]:
        """`perfect_memory`, which makes no error; what a state of few bytes must lose is the task's question."""
        return {"perfect_memory": PerfectMemory(self.vocabulary, self.length - 1)}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the symbols."""
        return {"accuracy": 1 / (self.vocabulary - 1), "cross_entropy": math.log(self.vocabulary - 1)}
