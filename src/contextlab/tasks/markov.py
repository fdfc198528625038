"""Markov chains: unknown ones, whose table is learned in context, and known ones with an exception to copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, at_most
from contextlab.learners.ngrams import (
    BackoffNgram,
    BigramBackcopyLearner,
    Induction,
    MarkovOracle,
    MarkovPosterior,
    OrderPosterior,
    followed,
)
from contextlab.learners.text import ContextNgram
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.corrupting import exchange_answers, exchanged

MOST_CONTEXTS = 4096
"""Rows of a transition table at most; each prompt draws one of its own."""


def draw_dirichlet(
    shape: tuple[int, ...], concentration: float, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Distributions [*shape] over the last axis, Dirichlet(concentration, ...), float32.

    A Gamma(a) variable is a Gamma(a + 1) times U^(1 / a): in logarithms, small concentrations cannot underflow.
    """
    above = torch.full(shape, concentration + 1.0, device=device)
    logs = torch._standard_gamma(above, generator=generator).log()
    uniform = torch.rand(shape, generator=generator, device=device)
    return (logs + torch.log1p(-uniform) / concentration).softmax(-1)


def draw_from(cumulative: Tensor, generator: torch.Generator) -> Tensor:
    """One symbol for each cumulative distribution [..., vocabulary]: the values that a uniform number has passed."""
    uniform = torch.rand(cumulative.shape[:-1], generator=generator, device=cumulative.device)
    return (cumulative[..., :-1] <= uniform.unsqueeze(-1)).sum(-1)


@dataclass(frozen=True)
class _Sequence(TokenTask):
    """Base: every token is predicted, so cross-entropy counts, and a prompt is shown as its tokens alone."""

    metric: ClassVar[str] = "cross_entropy"
    higher_is_better: ClassVar[bool] = False

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The tokens as symbols."""
        return " ".join(self.symbol(token) for token in prompt.inputs[row].tolist())


@register(
    "task",
    "markov_chain",
    family="recall",
    papers=("2402.11004",),
    cases=({"length": 64}, {"orders": (1, 2), "vocabulary": 3}),
)
@dataclass(frozen=True)
class MarkovChain(_Sequence):
    """In-context learning of Markov chains (2402.11004): each prompt is one sequence of a chain of its own.

    The next token depends on the last `order` tokens; for each of their combinations its distribution is drawn from
    Dirichlet(concentration, ..., concentration). The first `order` tokens are uniform, which makes the posterior exact
    (what the paper does with them was not verified). Each position after them predicts the next token. `shot` is the
    number of tokens seen.

    vocabulary: number of symbols.
    orders: tokens that the next one depends on; each prompt draws one of them, all equally likely.
    length: tokens in the prompt.
    concentration: of the Dirichlet distribution; 1 draws all distributions evenly, less makes them sharper.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 3, "length": 64, "concentration": 0.3},
        "hard": {"vocabulary": 5, "length": 512, "orders": (1, 2, 3)},
    }

    vocabulary: PositiveInt = 8
    orders: tuple[PositiveInt, ...] = (1,)
    length: PositiveInt = 128
    concentration: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check_options(self)
        if not self.orders:
            raise InputError("orders is empty; name at least one order, such as 1")
        if self.vocabulary < 2:
            raise InputError("vocabulary 1 leaves nothing to predict; use 2 or more")
        if max(self.orders) > 64 or self.vocabulary ** max(self.orders) > MOST_CONTEXTS:
            most = int(math.log(MOST_CONTEXTS, self.vocabulary) + 1e-9)
            raise InputError(
                f"orders: {max(self.orders)} tokens of {self.vocabulary} symbols make more than {MOST_CONTEXTS} "
                "contexts; use " + (f"an order of at most {most}, or fewer symbols" if most else "fewer symbols")
            )
        if self.length <= max(self.orders):
            raise InputError(f"length {self.length} is too short for order {max(self.orders)}; use more tokens than it")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    def symbol(self, token: int) -> str:
        """Letters a, b, ... while they last."""
        return chr(97 + token) if self.vocabulary <= 26 else str(token)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]. `hidden`: order [batch], transition [batch, contexts, vocabulary]."""
        size, most = self.vocabulary, max(self.orders)
        shape = (batch, size**most, size)
        transition = draw_dirichlet(shape, self.concentration, generator, device)
        choice = torch.randint(len(self.orders), (batch,), generator=generator, device=device)
        order = torch.tensor(self.orders, device=device)[choice]
        cumulative = transition.cumsum(-1)
        uniform = torch.rand(batch, self.length + 1, generator=generator, device=device)
        sequence = torch.empty(batch, self.length + 1, dtype=torch.int64, device=device)
        # A row's number in the table has the last token as its lowest digit, so a lower order uses the first rows.
        row, rows, modulus = torch.zeros_like(order), torch.arange(batch, device=device), size**order
        for t in range(self.length + 1):
            threshold = uniform[:, t]
            token = (cumulative[rows, row, :-1] <= threshold.unsqueeze(1)).sum(1)
            if t < most:
                token = torch.where(t < order, (threshold * size).long().clamp(max=size - 1), token)
            sequence[:, t] = token
            row = (row * size + token) % modulus
        at = torch.arange(self.length, device=device)
        scored = (at + 1 >= order.unsqueeze(1)).contiguous()
        shot = (at + 1).expand(batch, -1)
        hidden = {"transition": transition, "order": order}
        return Prompt(sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous(), scored, shot, hidden=hidden)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The sequence of the chain in which two symbols have changed their roles: the last one and any other."""
        made, one, other = exchange_answers(prompt, generator, 0, self.vocabulary)
        assert prompt.hidden is not None
        symbols = torch.arange(self.vocabulary, device=one.device)
        name = exchanged(symbols.expand(len(one), -1), one, other)  # [B, V]
        table, order = prompt.hidden["transition"], prompt.hidden["order"]
        table = table.gather(2, name.unsqueeze(1).expand_as(table))
        for each in set(self.orders):  # row of a chain of this order: its last tokens, digit by digit
            rows = torch.zeros_like(one)
            for _ in range(each):
                rows = (rows.unsqueeze(2) * self.vocabulary + name.unsqueeze(1)).flatten(1)
            rest = torch.arange(rows.shape[1], table.shape[1], device=one.device).expand(len(one), -1)
            whole = torch.cat([rows, rest], 1).unsqueeze(2).expand_as(table)
            table = torch.where((order == each).view(-1, 1, 1), table.gather(1, whole), table)
        return replace(made, hidden={**prompt.hidden, "transition": table})

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "order" of the chain, and "seen": how often its last tokens have come before."""
        assert prompt.hidden is not None
        order = prompt.hidden["order"].unsqueeze(1).expand_as(prompt.scored)
        seen = torch.zeros_like(prompt.inputs)
        for each in set(self.orders):
            seen = torch.where(order == each, followed(prompt.inputs, each, self.vocabulary).sum(2).long(), seen)
        return {**super().facets(prompt), "order": order, "seen": seen}

    def learners(self) -> dict[str, Learner]:
        """The exact posterior first; then other counts, look-ups, and the oracle, which has read the table."""
        size, most = self.vocabulary, max(self.orders)
        found: dict[str, Learner] = {}
        if len(self.orders) > 1:
            found["order_posterior"] = OrderPosterior(size, self.orders, self.concentration)
        for order in sorted({*self.orders, 0}, reverse=True):  # order 0: single tokens, an early phase of training
            found[f"order_{order}_posterior"] = MarkovPosterior(size, order, self.concentration)
        found["backoff_ngram"] = BackoffNgram(size, most + 1)
        found["context_ngram"] = ContextNgram(size, most + 1)
        found["induction"] = Induction(size, most)
        found["oracle"] = MarkovOracle(size)
        return found

    def splits(self) -> dict[str, Task]:
        """'train', twice the tokens, sharper and flatter distributions, and one order more where the table allows."""
        found: dict[str, Task] = {"train": self, f"length={2 * self.length}": self.replace(length=2 * self.length)}
        for concentration in (self.concentration / 4, self.concentration * 4):
            found[f"concentration={concentration:g}"] = self.replace(concentration=concentration)
        more = max(self.orders) + 1
        if self.vocabulary**more <= MOST_CONTEXTS and more < self.length:
            found[f"order={more}"] = self.replace(orders=(more,))
        return found

    def chance(self) -> Mapping[str, float]:
        """The uniform distribution."""
        return {"cross_entropy": math.log(self.vocabulary)}


@register(
    "task", "bigram_backcopy", family="recall", papers=("2410.13835",), cases=({}, {"triggers": 1, "vocabulary": 12})
)
@dataclass(frozen=True)
class BigramBackcopy(_Sequence):
    """Bigram-backcopy (2410.13835), in which attention sinks arise: a known chain, and triggers that copy back.

    A beginning-of-sequence token stands first (id `vocabulary`). After a trigger comes the token that stood before the
    trigger; after any other token the next one of a chain whose table is the same in all prompts. Heads that copy have
    nothing to do where there is no trigger. The table has Dirichlet rows and the triggers are drawn at random, both by
    `seed`; in the paper the bigrams are those of a text. The first token after the beginning is drawn uniformly among
    those that are no triggers. `shot` is the number of tokens seen.

    vocabulary: number of symbols, triggers included.
    triggers: symbols after which the token before is copied.
    length: tokens in the prompt, the beginning included.
    concentration: of the Dirichlet distribution of the table's rows.
    seed: of the table and the triggers.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 8, "triggers": 2, "length": 32, "concentration": 1.0},
        "hard": {"vocabulary": 64, "triggers": 3, "length": 256},
    }

    vocabulary: PositiveInt = 32
    triggers: PositiveInt = 3
    length: PositiveInt = 128
    concentration: PositiveFloat = 0.3
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.vocabulary > MOST_CONTEXTS:
            raise InputError(
                f"vocabulary {self.vocabulary} is too large for a table of bigrams; at most {MOST_CONTEXTS}"
            )
        if self.triggers >= self.vocabulary:
            raise InputError(
                f"triggers {self.triggers} leave no other symbol: vocabulary is {self.vocabulary}; "
                + at_most(self.vocabulary - 1, f"use vocabulary {self.triggers + 1} or more")
            )
        if self.length < 3:
            raise InputError(f"length {self.length} has no room for a token before a trigger; use 3 or more")

    @property
    def input_size(self) -> int:
        return self.vocabulary + 1

    def symbol(self, token: int) -> str:
        """The beginning as <s>, triggers with a star."""
        if token == self.vocabulary:
            return "<s>"
        return f"{token}*" if token in self.table()[1].tolist() else str(token)

    def table(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The probabilities of the next token [vocabulary + 1, vocabulary + 1], and the triggers' ids.

        The rows of triggers are those of the chain without copying; no sequence uses them. The last row is that of the
        beginning.
        """
        found = _table(self.vocabulary, self.triggers, self.concentration, self.seed)
        return found[0].to(device), found[1].to(device)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts [batch, length]. `hidden`: copied [batch, length] bool, where the next token is copied back."""
        transition, triggers = self.table(device)
        cumulative = transition.cumsum(-1)
        stops = torch.isin(torch.arange(self.input_size, device=device), triggers)
        sequence = torch.full((batch, self.length + 1), self.vocabulary, device=device)
        for t in range(1, self.length + 1):
            last = sequence[:, t - 1]
            token = draw_from(cumulative[last, : self.vocabulary], generator)
            sequence[:, t] = torch.where(stops[last], sequence[:, t - 2], token) if t > 1 else token
        inputs, targets = sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous()
        scored = torch.ones_like(inputs, dtype=torch.bool)
        shot = torch.arange(1, self.length + 1, device=device).expand(batch, -1)
        return Prompt(inputs, targets, scored, shot, hidden={"copied": stops[inputs]})

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "copied": 1 after a trigger, where the next token is copied back."""
        assert prompt.hidden is not None
        return {**super().facets(prompt), "copied": prompt.hidden["copied"].long()}

    def learners(self) -> dict[str, Learner]:
        """The exact conditional distribution, then what can be learned from the prompt alone."""
        size = self.input_size
        return {
            "bigram_backcopy": BigramBackcopyLearner(size, *self.table()),
            "context_ngram": ContextNgram(size, 2),
            "order_1_posterior": MarkovPosterior(size, 1, self.concentration),
            "induction": Induction(size),
        }

    def splits(self) -> dict[str, Task]:
        """'train', and twice and four times the tokens. Another `seed` would be other knowledge, not a shift."""
        longer = {f"length={n * self.length}": self.replace(length=n * self.length) for n in (2, 4)}
        return {"train": self, **longer}

    def chance(self) -> Mapping[str, float]:
        """The uniform distribution over the symbols."""
        return {"cross_entropy": math.log(self.vocabulary)}


@lru_cache(maxsize=16)
def _table(vocabulary: int, triggers: int, concentration: float, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn on the CPU, so that it is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    rows = draw_dirichlet((vocabulary, vocabulary), concentration, generator, "cpu")
    chosen = torch.randperm(vocabulary, generator=generator)[:triggers].sort().values
    start = torch.ones(1, vocabulary).index_fill_(1, chosen, 0) / (vocabulary - triggers)
    return F.pad(torch.cat([rows, start]), (0, 1)), chosen  # nothing leads to the beginning
