"""MAD's in-context recall (mechanistic architecture design, 2403.17844), plain and noisy, after the authors' generator.

Fuzzy recall is in mad_fuzzy.py, memorization and compression are in mad_storage.py; selective copying, the sixth of the
tasks, is selective_copy. The authors train on every next token of the recall tasks and test only on what can be known;
here only that is scored, in training too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.ngrams import last_seen
from contextlab.learners.recall import Lookup
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import chosen_of, exchanged

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

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The key that is asked for last and another one with another value in each other's places before."""
        keys = prompt.inputs[:, :-1:2]
        value, asked = prompt.inputs[:, 1::2], prompt.inputs[:, -1:]
        keys = torch.where((keys < self.keys) & (value != prompt.targets[:, -1:]), keys, asked)
        number, there = chosen_of(keys != asked, generator)
        other = torch.where(there, keys.gather(1, number), asked)
        inputs = torch.cat([exchanged(prompt.inputs[:, :-1], asked, other), asked], 1)
        answer = torch.where(there, value.gather(1, number), prompt.targets[:, -1:])
        return replace(prompt, inputs=inputs, targets=torch.cat([inputs[:, 1:], answer], 1))

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
        """Guessing uniformly among the values."""
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
