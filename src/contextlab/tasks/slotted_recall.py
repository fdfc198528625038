"""Associative recall in slots: a context that binds keys to values, then queries; the base of the variants."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError, at_most
from contextlab.prompt import Prompt, Task, last_scored
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import bound_anew, exchange_answers


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

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The key that is asked for last and another one in each other's bindings, and so for all of their queries."""
        if self.bindings == 1 or self.value_tokens > 1:  # of several tokens, the answer is fed back
            return exchange_answers(prompt, generator, self.first_value, self.vocabulary)[0]
        size = self.key_tokens + self.value_tokens
        shown = prompt.inputs[:, : self.context]
        keys, values = shown[:, ::size], shown[:, size - 1 :: size]
        first = (keys.unsqueeze(2) != values.unsqueeze(1)).all(2)  # those that are no value of another key
        fallback = prompt.inputs.gather(1, last_scored(prompt)[:, None] - self.key_tokens + 1)
        keys = torch.where(first, keys, fallback)
        return self.answered(prompt, bound_anew(prompt, generator, keys, self.context, self.key_tokens - 1))

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
        """Guessing uniformly among the values."""
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
