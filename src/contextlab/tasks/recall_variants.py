"""Variants of associative recall: bindings that are overwritten, keys of two tokens, values of values, long values.

(Gaps between a pair and its query: see `power` of associative_recall, which these tasks share.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.copying import ChainedLookup, SegmentLookup
from contextlab.learners.ngrams import Induction
from contextlab.learners.recall import Lookup
from contextlab.prompt import Learner
from contextlab.registry import register
from contextlab.tasks.slotted_recall import SlottedRecall, distinct, need


@register(
    "task",
    "overwritten_recall",
    family="recall",
    papers=("2312.04927",),
    cases=({}, {"pairs": 4, "updates": 4, "filler": "blank"}),
)
@dataclass(frozen=True)
class OverwrittenRecall(SlottedRecall):
    """Recall with forgetting, as in Zoology's code: some keys are bound a second time, and the last value counts.

    Key-value pairs, then some of the keys again, each with another value than before; then queries. Keys are the lower
    half of the vocabulary; no key is in two of the first pairs, nor a value. Errors can be
    grouped by whether an answer had been `overwritten`.

    vocabulary: number of symbols; half are keys, half are values.
    pairs: keys in the prompt.
    updates: keys that are bound again.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 32, "pairs": 4, "updates": 2, "length": 24},
        "hard": {"vocabulary": 8192, "pairs": 64, "updates": 64, "length": 512},
    }

    pairs: PositiveInt = 12
    updates: PositiveInt = 6

    def check_symbols(self) -> None:
        need(self, "pairs", self.pairs, self.vocabulary // 2, f"{self.vocabulary // 2} keys")
        if self.vocabulary < 4:
            raise InputError(f"vocabulary {self.vocabulary} has no two values; use 4 or more")
        if self.updates > self.pairs:
            raise InputError(f"updates {self.updates} are more than pairs {self.pairs}; at most {self.pairs}")

    @property
    def bindings(self) -> int:
        return self.pairs

    @property
    def context(self) -> int:
        return 2 * (self.pairs + self.updates)

    @property
    def first_value(self) -> int:
        return self.vocabulary // 2

    def bind(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        first, values = self.first_value, self.vocabulary - self.first_value
        keys = distinct(batch, self.pairs, first, generator, device)
        old = distinct(batch, self.pairs, values, generator, device)
        again = distinct(batch, self.updates, self.pairs, generator, device)
        step = torch.randint(1, values, (batch, self.updates), generator=generator, device=device)
        new = (old.gather(1, again) + step) % values  # any value but the old one
        last = old.scatter(1, again, new)
        pairs = torch.stack([torch.cat([keys, keys.gather(1, again)], 1), first + torch.cat([old, new], 1)], 2)
        place = 2 * torch.arange(self.pairs + self.updates, device=device).expand(batch, -1)
        facts = {
            "place": place[:, : self.pairs].scatter(1, again, place[:, self.pairs :]),
            "overwritten": torch.zeros_like(keys).scatter_(1, again, 1),
        }
        return pairs.flatten(1), keys.unsqueeze(-1), first + last.unsqueeze(-1), facts

    def learners(self) -> dict[str, Learner]:
        """`induction` finds the last value and makes no error; `lookup` finds the first."""
        return {"induction": Induction(self.output_size), "lookup": Lookup(self.output_size)}

    def harder(self) -> list[tuple[str, int]]:
        return [("updates", self.pairs), ("pairs", 2 * self.pairs)]


@register(
    "task", "compositional_recall", family="recall", papers=("2312.04927",), cases=({}, {"grid": 2, "filler": "blank"})
)
@dataclass(frozen=True)
class CompositionalRecall(SlottedRecall):
    """Recall by keys of two tokens, as in Zoology's code: neither token alone tells the value.

    Of `grid` first and `grid` second key symbols, all combinations stand in random order, each with a value of its own.
    Queries show both symbols, and the value is predicted at the second. The vocabulary is cut in three: first key
    symbols, second key symbols, values.

    vocabulary: number of symbols.
    grid: first key symbols in a prompt, and second ones; its square is the number of bindings.
    """

    key_tokens: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 30, "grid": 2, "length": 24},
        "hard": {"vocabulary": 8192, "grid": 8, "length": 384},
    }

    grid: PositiveInt = 4

    def check_symbols(self) -> None:
        need(self, "grid", self.grid, self.vocabulary // 3, f"{self.vocabulary // 3} first key symbols")
        room = math.isqrt(self.vocabulary - self.first_value)
        need(self, "grid", self.grid, room, f"values for a grid of {room}")

    @property
    def bindings(self) -> int:
        return self.grid**2

    @property
    def context(self) -> int:
        return 3 * self.grid**2

    @property
    def first_value(self) -> int:
        return 2 * (self.vocabulary // 3)

    def symbol(self, token: int) -> str:
        """First key symbols as a0, a1, ..., second ones as b0, b1, ..., values as v0, v1, ..., a blank as _."""
        third = self.vocabulary // 3
        if token < self.first_value:
            return f"a{token}" if token < third else f"b{token - third}"
        return super().symbol(token)

    def bind(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        third = self.vocabulary // 3
        one = distinct(batch, self.grid, third, generator, device)
        two = third + distinct(batch, self.grid, third, generator, device)
        order = distinct(batch, self.bindings, self.bindings, generator, device)
        keys = torch.stack([one.gather(1, order // self.grid), two.gather(1, order % self.grid)], 2)
        values = distinct(batch, self.bindings, self.vocabulary - self.first_value, generator, device)
        values = (self.first_value + values).unsqueeze(-1)
        place = 1 + 3 * torch.arange(self.bindings, device=device).expand(batch, -1)
        return torch.cat([keys, values], 2).flatten(1), keys, values, {"place": place}

    def learners(self) -> dict[str, Learner]:
        """Induction by two tokens makes no error; by one it finds a value of another key."""
        return {"induction": Induction(self.output_size, 2), "1-gram_lookup": Induction(self.output_size, 1)}

    def harder(self) -> list[tuple[str, int]]:
        return [("grid", self.grid + 1), ("grid", 2 * self.grid)]


@register(
    "task",
    "chained_recall",
    family="recall",
    papers=("2312.04927",),
    cases=({}, {"chains": 3, "hops": 3, "filler": "blank"}),
)
@dataclass(frozen=True)
class ChainedRecall(SlottedRecall):
    """Recall of the value of a value: a -> b and b -> c stand among the pairs, a is asked for, and c is the answer.

    Chains of `hops` pairs each, all pairs in random order; no symbol is in two chains. Queries are the chains' first
    symbols. With one hop it is associative recall (2312.04927) with keys and values of one kind.

    vocabulary: number of symbols, keys and values alike.
    chains: chains in the prompt.
    hops: pairs of each chain.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 32, "chains": 3, "length": 24},
        "hard": {"vocabulary": 1024, "chains": 16, "hops": 4, "length": 256},
    }

    chains: PositiveInt = 8
    hops: PositiveInt = 2

    def check_symbols(self) -> None:
        need(
            self,
            "chains",
            self.chains,
            self.vocabulary // (self.hops + 1),
            f"{self.vocabulary // (self.hops + 1)} chains of {self.hops + 1} symbols",
        )

    @property
    def bindings(self) -> int:
        return self.chains

    @property
    def context(self) -> int:
        return 2 * self.chains * self.hops

    @property
    def first_value(self) -> int:
        return 0

    def symbol(self, token: int) -> str:
        """Symbols as numbers, a blank as _."""
        return "_" if token == self.vocabulary else str(token)

    def bind(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        symbols = distinct(batch, self.chains * (self.hops + 1), self.vocabulary, generator, device)
        chain = symbols.unflatten(1, (self.chains, self.hops + 1))
        pairs = torch.stack([chain[..., :-1], chain[..., 1:]], -1).flatten(1, 2)
        order = distinct(batch, pairs.shape[1], pairs.shape[1], generator, device)
        pairs = pairs.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
        place = 2 * order.argsort(1)[:, :: self.hops]  # of each chain's first pair
        return pairs.flatten(1), chain[..., :1], chain[..., -1:], {"place": place}

    def learners(self) -> dict[str, Learner]:
        """`chained_lookup` makes no error; `lookup` stops at the first value."""
        size = self.output_size
        return {"chained_lookup": ChainedLookup(size, self.chains * self.hops, self.hops), "lookup": Lookup(size)}

    def harder(self) -> list[tuple[str, int]]:
        return [("chains", 2 * self.chains), ("hops", self.hops + 1)]


@register("task", "multi_value_recall", family="recall", papers=("2312.04927",), cases=({}, {"pairs": 4, "values": 5}))
@dataclass(frozen=True)
class MultiValueRecall(SlottedRecall):
    """Recall of values of several tokens: a key is bound to a sequence, and the query's answer is fed back.

    As associative recall (2312.04927), with `values` value tokens after each key. They are uniform, so one value symbol
    may be in several answers. No key is in two bindings.

    vocabulary: number of symbols; half are keys, half are values.
    pairs: keys in the prompt.
    values: tokens of each answer.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 32, "pairs": 3, "values": 2, "length": 24},
        "hard": {"vocabulary": 1024, "pairs": 32, "values": 4, "length": 384},
    }

    pairs: PositiveInt = 8
    values: PositiveInt = 3

    def check_symbols(self) -> None:
        need(self, "pairs", self.pairs, self.vocabulary // 2, f"{self.vocabulary // 2} keys")

    @property
    def bindings(self) -> int:
        return self.pairs

    @property
    def context(self) -> int:
        return self.pairs * (self.values + 1)

    @property
    def first_value(self) -> int:
        return self.vocabulary // 2

    @property
    def value_tokens(self) -> int:
        return self.values

    def bind(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        keys = distinct(batch, self.pairs, self.first_value, generator, device).unsqueeze(-1)
        shape = (batch, self.pairs, self.values)
        answers = torch.randint(self.first_value, self.vocabulary, shape, generator=generator, device=device)
        place = (self.values + 1) * torch.arange(self.pairs, device=device).expand(batch, -1)
        return torch.cat([keys, answers], 2).flatten(1), keys, answers, {"place": place}

    def learners(self) -> dict[str, Learner]:
        """`segment_lookup` makes no error; `induction` goes over to another answer that has the same token."""
        size = self.output_size
        return {"segment_lookup": SegmentLookup(size, self.first_value), "induction": Induction(size)}

    def harder(self) -> list[tuple[str, int]]:
        return [("pairs", 2 * self.pairs), ("values", self.values + 2)]
