"""Associative recall: pairs of symbols, then keys whose values are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, at_most
from contextlab.learners.recall import Lookup
from contextlab.prompt import Learner, Prompt, Task, wide
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import bound_anew, exchange_answers


@register(
    "task", "associative_recall", family="recall", papers=("2312.04927",), cases=({}, {"pairs": 8, "filler": "blank"})
)
@dataclass(frozen=True)
class AssociativeRecall(TokenTask):
    """Multi-query associative recall (MQAR, Zoology): key-value pairs, later some of the keys again.

    The first 2 * pairs tokens are key, value, key, value, ...; the rest is cut into slots of two tokens. A
    query is a key in the first place of a slot, and its target is the key's value; the value is not shown
    again. Every other place holds filler. Slots are drawn without replacement, slot s (from 1) with weight s
    ** (power - 1), so that most queries come soon after the pairs. Keys are the lower half of the
    vocabulary, values the upper half; no key and no value is in two pairs. `shot` is the number of pairs.

    vocabulary: number of symbols; half are keys, half are values.
    pairs: key-value pairs in the prompt.
    length: tokens in the prompt.
    queries: keys asked for; None for as many as fit, at most `pairs`.
    power: exponent of the power law of the gaps; 1 spreads the queries evenly.
    filler: "random" values, a "blank" symbol of its own (id `vocabulary`), or "any" symbol, as Zoology's code has it: a
        key after the pairs is not always a query then, and what followed its last occurrence not always its value.
    test_pairs: pairs of the test splits; None for half, the same and double as many, where they fit.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 64, "pairs": 4, "length": 24},
        "hard": {"vocabulary": 8192, "pairs": 64, "length": 256},
    }

    vocabulary: PositiveInt = 128
    pairs: PositiveInt = 16
    length: PositiveInt = 96
    queries: PositiveInt | None = None
    power: NonNegativeFloat = 0.01
    filler: Literal["random", "blank", "any"] = "random"
    test_pairs: tuple[PositiveInt, ...] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.length % 2:
            raise InputError(
                f"length {self.length} is odd; pairs and slots take two tokens each: use {self.length + 1}"
            )
        for pairs in (self.pairs, *(self.test_pairs or ())):
            self._check_pairs(pairs)
        if self.queries is not None and self.queries > (most := self._most_queries(self.pairs)):
            raise InputError(
                f"queries {self.queries} do not fit: {self.pairs} pairs in length {self.length} leave room for {most}"
            )

    def _check_pairs(self, pairs: int) -> None:
        if pairs > self.keys:
            raise InputError(
                f"pairs {pairs} do not fit: vocabulary {self.vocabulary} holds {self.keys} keys; "
                + at_most(self.keys, f"use vocabulary {2 * pairs} or more")
            )
        if self._most_queries(pairs) < 1:
            raise InputError(
                f"pairs {pairs} do not fit: with one query they take {2 * pairs + 2} tokens, and length is "
                f"{self.length}; " + at_most(self.length // 2 - 1, f"use length {2 * pairs + 2} or more")
            )

    def _most_queries(self, pairs: int) -> int:
        return min(pairs, self.length // 2 - pairs)

    @property
    def keys(self) -> int:
        """Symbols that can be keys: ids 0 to keys - 1. The values are keys to vocabulary - 1."""
        return self.vocabulary // 2

    @property
    def values(self) -> int:
        """Symbols that can be values."""
        return self.vocabulary - self.keys

    @property
    def asked(self) -> int:
        """Queries in each prompt."""
        return self._most_queries(self.pairs) if self.queries is None else self.queries

    @property
    def input_size(self) -> int:
        return self.vocabulary + (self.filler == "blank")

    def symbol(self, token: int) -> str:
        """Keys as k0, k1, ..., values as v0, v1, ..., a blank as _."""
        if token == self.vocabulary:
            return "_"
        return f"k{token}" if token < self.keys else f"v{token - self.keys}"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs, targets and shot [batch, length] int64, scored [batch, length] bool."""
        start, slots = 2 * self.pairs, self.length // 2 - self.pairs
        # One draw of uniform numbers serves all choices; the order of independent numbers is a random choice.
        sizes = [self.keys, self.values, slots, self.pairs if self.asked < self.pairs else 0]
        uniform = torch.rand(batch, sum(sizes), generator=generator, device=device)
        for_keys, for_values, for_slots, for_pairs = uniform.split(sizes, dim=1)
        keys = for_keys.topk(self.pairs, dim=1).indices
        values = for_values.topk(self.pairs, dim=1).indices + self.keys
        # Exponential races (Gumbel top-k): the k smallest of e / weight are a weighted draw without
        # replacement.
        weight = torch.arange(1, slots + 1, device=device, dtype=uniform.dtype) ** (self.power - 1)
        slot = (-torch.log1p(-for_slots) / weight).topk(self.asked, dim=1, largest=False).indices
        asked_keys, answers = keys, values
        if self.asked < self.pairs:
            chosen = for_pairs.topk(self.asked, dim=1).indices.sort(dim=1).values
            asked_keys, answers = keys.gather(1, chosen), values.gather(1, chosen)

        shape, at = (batch, self.length), start + 2 * slot
        if self.filler == "blank":
            inputs = torch.full(shape, self.vocabulary, device=device)
        else:
            least = self.keys if self.filler == "random" else 0
            inputs = torch.randint(least, self.vocabulary, shape, generator=generator, device=device)
        inputs[:, 0:start:2] = keys
        inputs[:, 1:start:2] = values
        inputs.scatter_(1, at, asked_keys)
        targets = torch.zeros(shape, dtype=torch.int64, device=device).scatter_(1, at, answers)
        scored = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(1, at, True)
        shot = torch.arange(self.length, device=device).add(1).div(2, rounding_mode="floor").clamp(max=self.pairs)
        return Prompt(inputs, targets, scored, shot.expand(shape))

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The key that is asked for last and another one in each other's pairs; with one pair, another value."""
        if self.pairs == 1:
            return exchange_answers(prompt, generator, self.keys, self.vocabulary)[0]
        start = 2 * self.pairs
        return self.answered(prompt, bound_anew(prompt, generator, prompt.inputs[:, 0:start:2], start))

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross-entropy in nats at the queries. prediction: logits [B, T, output_size]."""
        # All rows have the same number of queries, so their places have a fixed shape: the softmax is
        # computed there only, and no size depends on the data (CUDA graphs and vmap need that).
        at = prompt.scored.to(torch.uint8).topk(self.asked, dim=1).indices
        logits = prediction.gather(1, at.unsqueeze(-1).expand(-1, -1, prediction.shape[-1]))
        return F.cross_entropy(wide(logits.flatten(0, 1)), prompt.targets.gather(1, at).flatten())

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "distance": tokens from a key's pair to where it is asked for."""
        keys = prompt.inputs[:, 0 : 2 * self.pairs : 2]
        place = 2 * (prompt.inputs.unsqueeze(2) == keys.unsqueeze(1)).to(torch.uint8).argmax(2)
        found = super().facets(prompt)
        return {**found, "distance": (found["position"] - place).clamp_min(0)}

    def learners(self) -> dict[str, Learner]:
        """`lookup`, which makes no error."""
        return {"lookup": Lookup(self.output_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then 'pairs=N' for each of `test_pairs`, then 'length=N' with twice the tokens."""
        tests = self.test_pairs
        if tests is None:
            near = (self.pairs // 2, self.pairs, 2 * self.pairs)
            tests = tuple(n for n in near if 1 <= n <= self.keys and self._most_queries(n) >= 1)
        found: dict[str, Task] = {"train": self}
        for pairs in tests:
            queries = None if self.queries is None else min(self.queries, self._most_queries(pairs))
            found[f"pairs={pairs}"] = self.replace(pairs=pairs, queries=queries)
        found[f"length={2 * self.length}"] = self.replace(length=2 * self.length)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the values."""
        return {"accuracy": 1 / self.values, "cross_entropy": math.log(self.values)}
