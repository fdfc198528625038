"""Variants of associative recall: bindings that are overwritten, keys of two tokens, values of values, long values.

(Gaps between a pair and its query: see `power` of associative_recall, which these tasks share.)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError, at_most
from contextlab.learners.copying import ChainedLookup, SegmentLookup
from contextlab.learners.ngrams import Induction
from contextlab.learners.recall import Lookup
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options


@dataclass(frozen=True)
class SlottedRecall(TokenTask):
    """Base: a context that binds keys to values, then slots, some of which ask for a key.

    A slot has room for a key and its value, without the value's last token, and one token of filler. Slots are drawn
    without replacement, slot s (from 1) with weight s ** (power - 1), so that most queries come soon after the context.
    All other places hold filler. `shot` is the number of bindings.

    length: tokens in the prompt.
    queries: keys asked for; None for as many as fit.
    power: exponent of the power law of the gaps; 1 spreads the queries evenly.
    filler: "random" values, or a "blank" symbol of its own (id `vocabulary`).
    """

    key_tokens: ClassVar[int] = 1

    vocabulary: PositiveInt = 128
    length: PositiveInt = 96
    queries: PositiveInt | None = None
    power: NonNegativeFloat = 0.01
    filler: Literal["random", "blank"] = "random"

    def __post_init__(self) -> None:
        check_options(self)
        self.check_symbols()
        least = self.context + self.slot
        if self.length < least:
            raise InputError(
                f"length {self.length} is too short: the bindings and one query take {least} tokens; at least {least}"
            )
        if self.queries is not None and self.queries > (most := self._most_queries()):
            raise InputError(f"queries {self.queries} do not fit: bindings and length leave room for {most}")

    @abstractmethod
    def check_symbols(self) -> None:
        """Raise InputError where the vocabulary is too small."""

    @property
    @abstractmethod
    def bindings(self) -> int:
        """Keys that can be asked for."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens before the slots."""

    @property
    @abstractmethod
    def first_value(self) -> int:
        """The first id that filler may have."""

    @property
    def value_tokens(self) -> int:
        """Tokens of an answer."""
        return 1

    @property
    def slot(self) -> int:
        """Tokens of a slot."""
        return self.key_tokens + self.value_tokens

    @property
    def asked(self) -> int:
        """Queries in each prompt."""
        return self._most_queries() if self.queries is None else self.queries

    @property
    def input_size(self) -> int:
        return self.vocabulary + (self.filler == "blank")

    def _most_queries(self) -> int:
        return min(self.bindings, (self.length - self.context) // self.slot)

    @abstractmethod
    def bind(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The context [batch, context], keys [batch, bindings, key_tokens], their answers [batch, bindings, tokens].

        And facts of each binding, [batch, bindings] int64, by which errors can be grouped: among them "place", at which
        the binding's (last) key ends. They become `hidden`, [batch, length] each.
        """

    def symbol(self, token: int) -> str:
        """Symbols that only keys have as k0, k1, ..., others as v0, v1, ..., a blank as _."""
        if token == self.vocabulary:
            return "_"
        return f"k{token}" if token < self.first_value else f"v{token - self.first_value}"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]."""
        context, keys, answers, facts = self.bind(batch, generator, device)
        slots, shape = (self.length - self.context) // self.slot, (batch, self.length)
        uniform = torch.rand(batch, self.bindings + slots, generator=generator, device=device)
        for_bindings, for_slots = uniform.split([self.bindings, slots], dim=1)
        chosen = for_bindings.topk(self.asked, dim=1).indices
        # Exponential races: the smallest of e / weight are a weighted draw without replacement.
        weight = torch.arange(1, slots + 1, device=device, dtype=uniform.dtype) ** (self.power - 1)
        at = (-torch.log1p(-for_slots) / weight).topk(self.asked, dim=1, largest=False).indices
        at = (self.context + self.slot * at).unsqueeze(-1)
        keys, answers = (each.gather(1, chosen.unsqueeze(-1).expand(-1, -1, each.shape[2])) for each in (keys, answers))

        if self.filler == "random":
            inputs = torch.randint(self.first_value, self.vocabulary, shape, generator=generator, device=device)
        else:
            inputs = torch.full(shape, self.vocabulary, device=device)
        inputs[:, : self.context] = context
        shown = torch.cat([keys, answers[..., :-1]], -1)
        inputs.scatter_(1, (at + torch.arange(shown.shape[2], device=device)).flatten(1), shown.flatten(1))
        asks = (at + self.key_tokens - 1 + torch.arange(self.value_tokens, device=device)).flatten(1)
        targets = torch.zeros_like(inputs).scatter_(1, asks, answers.flatten(1))
        scored = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(1, asks, True)
        hidden = {}
        for name, fact in facts.items():
            each = fact.gather(1, chosen).unsqueeze(-1).expand(-1, -1, self.value_tokens).flatten(1)
            hidden[name] = torch.zeros_like(inputs).scatter_(1, asks, each)
        size = self.context // self.bindings
        shot = torch.arange(1, self.length + 1, device=device).div(size, rounding_mode="floor")
        return Prompt(inputs, targets, scored, shot.clamp(max=self.bindings).expand(shape), hidden=hidden)

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also what is known of the binding, and "distance": tokens from its key to where it is asked for."""
        assert prompt.hidden is not None
        found = super().facets(prompt)
        begin = found["position"]
        if self.value_tokens > 1:  # of an answer's tokens, all have the distance of the first
            asks = prompt.inputs < self.first_value if self.first_value else prompt.scored
            begin = torch.where(asks & prompt.scored, begin, 0).cummax(1).values
        facts = {name: fact for name, fact in prompt.hidden.items() if name != "place"}
        return {**found, **facts, "distance": (begin - prompt.hidden["place"]).clamp_min(0)}

    def splits(self) -> dict[str, Task]:
        """'train', then half and double the bindings with room for as many queries, then twice the slots."""
        found: dict[str, Task] = {"train": self}
        for name, value in self.harder():
            try:
                found[f"{name}={value}"] = self._with(name, value)
            except InputError:
                continue  # more than the vocabulary holds
        more = 2 * self.length - self.context
        found[f"length={more}"] = self.replace(length=more)
        return found

    @abstractmethod
    def harder(self) -> list[tuple[str, int]]:
        """Options and values of the splits."""

    def _with(self, name: str, value: int) -> SlottedRecall:
        """One option changed, with as many tokens after the context as before."""
        wide: SlottedRecall = self.replace(**{name: value}, queries=None, length=100 * self.length)
        length = wide.context + max(self.length - self.context, wide.slot)
        changed: SlottedRecall = wide.replace(length=length)
        if self.queries is None:
            return changed
        return changed.replace(queries=min(self.queries, changed.asked))

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the values."""
        values = self.vocabulary - self.first_value
        return {"accuracy": 1 / values, "cross_entropy": math.log(values)}


def distinct(batch: int, count: int, among: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """`count` different numbers below `among` in random order, [batch, count] int64."""
    return torch.rand(batch, among, generator=generator, device=device).topk(count, dim=1).indices


def need(task: SlottedRecall, name: str, count: int, room: int, what: str) -> None:
    """Raise InputError where option `name` is more than there is room for. what: that the vocabulary holds."""
    if count > room:
        choice = at_most(room, "use a larger vocabulary")
        raise InputError(f"{name} {count} does not fit: vocabulary {task.vocabulary} holds {what}; {choice}")


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
