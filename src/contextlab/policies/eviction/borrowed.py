"""A policy that takes its score from another one, and all that belongs to the score."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.budget import Amount, Budget
from contextlab.policies.core.holders import Dense
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.seen import Seen
from contextlab.registry import entries, lookup


def score_of(
    of: str | EvictionPolicy, options: dict[str, Any], sinks: int | None, window: int | None
) -> EvictionPolicy:
    """The policy whose score it is, by name or made already, with its own number of sinks and its own window if given.

    Raises InputError where that is more than a score, or has no such options.
    """
    name = of if isinstance(of, str) else type(of).__name__
    factory = lookup("policy", of).factory if isinstance(of, str) else type(of)
    if not getattr(factory, "only_scores", False):
        fit = sorted(each.name for each in entries("policy") if getattr(each.factory, "only_scores", False))
        raise InputError(f"of: {name} does more than score tokens; expected one of {', '.join(fit)}")
    given = {name: x for name, x in (("sinks", sinks), ("window", window)) if x is not None}
    if not isinstance(of, str):
        if options or given:
            raise InputError(f"{next(iter({**options, **given}))}: this {name} has its own; leave it out")
        if type(of.holder) is not Dense:
            raise InputError(f"of: this {name} stores its tokens in another way; give it without")
        return of
    known = {each.name for each in lookup("policy", of).parameters}
    for option in given:
        if option not in known:
            raise InputError(f"{option}: {of} has no such option; leave it out")
    for option in options:
        if option in ("budget", "sinks", "window", "every", "reposition"):
            hint = "leave it out" if option == "reposition" else f"give {option} beside it"
            raise InputError(f"options: {option} is not an option of the score; {hint}")
    built: EvictionPolicy = lookup("policy", of).build(**given, **options)
    return built


class Borrowing(EvictionPolicy):
    """Base of the policies that score tokens as another one, `of`, does: what that asks for is asked for."""

    of: EvictionPolicy

    @property
    def observe(self) -> int:
        """See `EvictionPolicy.observe`."""
        return self.of.observe

    @property
    def accumulates(self) -> bool:
        """See `EvictionPolicy.accumulates`."""
        return self.of.accumulates

    @property
    def marks(self) -> bool:
        """See `EvictionPolicy.marks`."""
        return self.of.marks

    def mark(self, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        """See `EvictionPolicy.mark`."""
        return self.of.mark(layer, q, k, v, at)

    @property
    def pre_attention(self) -> bool:
        """See `EvictionPolicy.pre_attention`."""
        return self.of.pre_attention

    @property
    def reads_first(self) -> Literal["", "prompt", "everything"]:
        """See `Policy.reads_first`."""
        return self.of.reads_first

    def prepare(self, model: nn.Module, tokens: Tensor, prompt: int, mask: Tensor | None = None) -> None:
        """See `Policy.prepare`."""
        self.of.prepare(model, tokens, prompt, mask)

    @property
    def untrained(self) -> str:
        """See `Policy.untrained`."""
        return self.of.untrained

    def train_on(self, model: nn.Module, tokens: Tensor, answer: int, *, steps: int, seed: int = 0) -> None:
        """See `Policy.train_on`."""
        self.of.train_on(model, tokens, answer, steps=steps, seed=seed)

    def with_budget(self, budget: Amount) -> Borrowing:
        """See `Policy.with_budget`."""
        other = copy.copy(self)
        other.budget = other.allowed = Budget.of(budget)
        other.of = copy.copy(self.of)  # what either is prepared for is its own
        return other

    @property
    def turns(self) -> bool:
        """See `Policy.turns`: where the score does."""
        return self.reposition or self.of.turns

    @property
    def forgetting(self) -> float:
        """See `EvictionPolicy.forgetting`."""
        return self.of.forgetting

    @property
    def needs(self) -> str:
        """See `Policy.needs`: what the score needs."""
        return self.of.needs

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        super().check(layers)
        self.of.check(layers)

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: that of the other policy."""
        return self.of.score(seen)

    def remember(
        self, layer: KVLayer, notes: dict[str, Tensor], q: Tensor, places: Tensor, length: int
    ) -> dict[str, Tensor]:
        """See `EvictionPolicy.remember`."""
        return self.of.remember(layer, notes, q, places, length)

    def notes_nbytes(self, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `EvictionPolicy.notes_nbytes`."""
        return self.of.notes_nbytes(layer, batch, dtype)
