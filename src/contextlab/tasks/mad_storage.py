"""MAD's memorization and compression (2403.17844): what the weights, and what a state, must store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.copying import MemorizedPairs, PerfectMemory
from contextlab.prompt import Learner, Prompt, Task, wide
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options


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
        """Guessing uniformly among the values."""
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
    """MAD's compression: random symbols, then a mark (`|`) at which all of them are read from one vector.

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
        told = wide(prediction[:, -1]).unflatten(-1, (self.length - 1, self.vocabulary))
        return F.cross_entropy(told.flatten(0, 1), prompt.targets[:, :-1].flatten())

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy and cross_entropy in nats, means over the places, [B, T]."""
        told = wide(prediction).unflatten(-1, (self.length - 1, self.vocabulary))
        wanted = prompt.targets[:, None, :-1].expand(told.shape[:3])
        return {
            "accuracy": (told.argmax(-1) == wanted).float().mean(-1),
            "cross_entropy": F.cross_entropy(told.permute(0, 3, 1, 2), wanted, reduction="none").mean(-1),
        }

    def learners(self) -> dict[str, Learner]:
        """`perfect_memory`, which makes no error; what a state of few bytes must lose is the task's question."""
        return {"perfect_memory": PerfectMemory(self.vocabulary, self.length - 1)}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the symbols."""
        return {"accuracy": 1 / (self.vocabulary - 1), "cross_entropy": math.log(self.vocabulary - 1)}
