"""Learners that count what followed: induction look-up, n-gram models, posteriors of Markov chains.

Each prediction at t is made from the tokens up to t, for all prefixes at once: positions whose last tokens are the
same get the same number, and a comparison of those numbers (a mask of time by time) sums what followed each.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.answers import sure_of
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

MOST_CELLS = 2**24
"""Numbers in the largest table that a learner makes at once; more prompts are answered in turns."""


@dataclass(frozen=True)
class TokenLearner(Learner):
    """Base: a learner of token ids; it checks them, subclasses answer.

    vocabulary: number of symbols that can be predicted (the width of the logits).
    """

    vocabulary: PositiveInt

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary], float32. Raises InputError for prompts that hold other symbols."""
        return self.answer(token_ids(prompt, self.vocabulary, type(self).__name__))

    @abstractmethod
    def answer(self, tokens: Tensor) -> Tensor:
        """tokens: [B, T] int64. Returns log-probabilities [B, T, vocabulary], float32."""


@dataclass(frozen=True)
class CountingLearner(TokenLearner):
    """Base: probabilities from counts. Prompts are answered in chunks, so that no table gets too large."""

    def answer(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        turn = max(1, MOST_CELLS // max(1, length * max(length, self.vocabulary)))
        return torch.cat([self.probabilities(rows).log().float() for rows in tokens.split(turn)])

    @abstractmethod
    def probabilities(self, tokens: Tensor) -> Tensor:
        """tokens: [B, T] int64. Returns the probabilities of the next token [B, T, vocabulary], float64."""


def suffixes(tokens: Tensor, size: int) -> Tensor:
    """A number for the last `size` tokens at each position, [B, T] int64.

    Numbers are equal where those tokens are. The first size - 1 positions, which have fewer tokens, get -1.
    """
    ids = torch.zeros_like(tokens)
    base = int(tokens.max()) + 1 if tokens.numel() else 1
    for _ in range(size):
        # the last j tokens are the last j - 1 of the position before, and this one; `unique` keeps the numbers small
        before = F.pad(ids[:, :-1], (1, 0))
        ids = torch.unique(before * base + tokens, return_inverse=True)[1]
    ids[:, : max(size - 1, 0)] = -1
    return ids


def last_seen(ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """The last earlier position of each row with the same number, [B, T] int64; -1 where there is none or it is -1.

    counted: [B, T] bool, the positions that may be found; None for all.
    """
    ordered, order = ids.sort(dim=1, stable=True)
    group = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(1)
    place = order + 1 if counted is None else torch.where(counted.gather(1, order), order + 1, 0)
    # The largest place so far in a group: groups come in order, so a running maximum starts anew with each.
    step = ids.shape[1] + 1
    found = F.pad((group * step + place).cummax(1).values[:, :-1], (1, 0), value=-1)
    before = torch.where((found >= group * step) & (ordered >= 0), found % step - 1, -1)
    return torch.empty_like(before).scatter_(1, order, before)


def followed(tokens: Tensor, size: int, vocabulary: int) -> Tensor:
    """How often each symbol followed the last `size` tokens before, [B, T, vocabulary] float64.

    With size 0 it is how often each symbol came, the first token included.
    """
    if size == 0:
        return F.one_hot(tokens, vocabulary).cumsum(1).double()
    ids = suffixes(tokens, size)
    same = ((ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(1)).tril(-1)
    after = F.one_hot(F.pad(tokens[:, 1:], (0, 1)), vocabulary)  # the last has none after it, and none looks at it
    return (same.float() @ after.float()).double()  # counts are exact in float32


@register(
    "learner",
    "induction",
    family="recall",
    papers=("2402.01032",),
    cases=({"vocabulary": 16}, {"vocabulary": 16, "size": 3}),
)
@dataclass(frozen=True)
class Induction(TokenLearner):
    """Induction look-up: the token that followed the last occurrence of the last `size` tokens.

    What an induction head says; with size > 1, the n-gram look-up by which transformers copy (2402.01032). Tokens that
    are new together get the uniform distribution.

    size: tokens that must be the same.
    """

    size: PositiveInt = 1

    def answer(self, tokens: Tensor) -> Tensor:
        seen = last_seen(suffixes(tokens, self.size))
        return sure_of(tokens.gather(1, (seen + 1).clamp(max=tokens.shape[1] - 1)), seen >= 0, self.vocabulary)


@register("learner", "backoff_ngram", family="recall", cases=({"vocabulary": 16}, {"vocabulary": 16, "order": 1}))
@dataclass(frozen=True)
class BackoffNgram(CountingLearner):
    """n-gram model with back-off: the longest context that was followed before decides.

    With counts c of what followed the last order - 1 tokens, or as many fewer of them as it takes that something did,
    p(w) = (c(w) + smoothing) / (sum of c + smoothing * vocabulary).

    order: n; tokens of context, plus one.
    smoothing: added to each count.
    """

    order: PositiveInt = 3
    smoothing: PositiveFloat = 0.01

    def probabilities(self, tokens: Tensor) -> Tensor:
        counts = followed(tokens, 0, self.vocabulary)
        for size in range(1, self.order):
            longer = followed(tokens, size, self.vocabulary)
            counts = torch.where(longer.sum(-1, keepdim=True) > 0, longer, counts)
        counts = counts + self.smoothing
        return counts / counts.sum(-1, keepdim=True)


def markov_posterior(tokens: Tensor, order: int, concentration: float, vocabulary: int) -> Tensor:
    """Posterior predictive probabilities [B, T, vocabulary], float64, of a chain as `MarkovPosterior` describes it."""
    counts = followed(tokens, order, vocabulary) + concentration  # even while the context is short
    return counts / counts.sum(-1, keepdim=True)


@register("learner", "markov_posterior", family="recall", papers=("2402.11004",), cases=({"vocabulary": 8},))
@dataclass(frozen=True)
class MarkovPosterior(CountingLearner):
    """The posterior of a Markov chain whose table has Dirichlet rows: (count + concentration) / sum of the same.

    Bayes-optimal for chains whose rows are Dirichlet(concentration, ..., concentration), independently, and whose first
    `order` tokens are uniform. Order 0 counts single tokens; order 1 is the statistical induction head of 2402.11004.

    order: tokens that the next one depends on.
    concentration: of the Dirichlet distribution, the same for each symbol.
    """

    order: NonNegativeInt = 1
    concentration: PositiveFloat = 1.0

    def probabilities(self, tokens: Tensor) -> Tensor:
        return markov_posterior(tokens, self.order, self.concentration, self.vocabulary)


@register("learner", "order_posterior", family="recall", papers=("2402.11004",), cases=({"vocabulary": 8},))
@dataclass(frozen=True)
class OrderPosterior(CountingLearner):
    """Markov chains of unknown order: the posteriors of all orders, each weighed by how well it predicted so far.

    The product of an order's predictions of the tokens so far is its marginal likelihood, so the weights are the exact
    posterior of the order, and the mixture is Bayes-optimal, if all orders are equally likely a priori.

    orders: those that are possible.
    concentration: of the Dirichlet distribution of the rows, the same for each symbol and order.
    """

    orders: tuple[NonNegativeInt, ...] = (0, 1, 2)
    concentration: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.orders:
            raise InputError("orders is empty; name at least one order, such as 1")

    def probabilities(self, tokens: Tensor) -> Tensor:
        parts = [markov_posterior(tokens, order, self.concentration, self.vocabulary) for order in self.orders]
        each = torch.stack(parts)  # [orders, B, T, V]
        came = tokens[:, 1:, None].expand(len(parts), -1, -1, 1)
        evidence = F.pad(each[:, :, :-1].gather(3, came).squeeze(3).log().cumsum(2), (1, 0))
        return (evidence.softmax(0).unsqueeze(-1) * each).sum(0)


@register("learner", "markov_oracle", family="recall", papers=("2402.11004",), cases=())
@dataclass(frozen=True)
class MarkovOracle(Learner):
    """The chain's true table, read from what the prompt hides (`transition`, `order`): no model can know it.

    Its cross-entropy is the entropy of the chain, a bound that the posterior meets after many tokens.

    vocabulary: number of symbols.
    """

    vocabulary: PositiveInt

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary]. Raises InputError for prompts that hide no table."""
        if prompt.hidden is None or not {"transition", "order"} <= prompt.hidden.keys():
            raise InputError("MarkovOracle needs a prompt that hides its table, such as markov_chain draws")
        table, order = prompt.hidden["transition"], prompt.hidden["order"]
        if table.shape[-1] != self.vocabulary:
            raise InputError(f"markov_oracle is for vocabulary {self.vocabulary}; the prompt's is {table.shape[-1]}")
        tokens = prompt.inputs
        states = table_rows(tokens, order, self.vocabulary)
        logits = table.gather(1, states.unsqueeze(-1).expand(-1, -1, self.vocabulary)).clamp(min=1e-30).log()
        known = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) >= order.unsqueeze(1)
        return torch.where(known.unsqueeze(-1), logits, -math.log(self.vocabulary))


def table_rows(tokens: Tensor, order: Tensor, vocabulary: int) -> Tensor:
    """The row of a transition table that the last order[b] tokens name, [B, T]: the last token counts least.

    tokens: [B, T]. order: [B]. Positions with fewer tokens are read as if token 0 stood before them.
    """
    rows = torch.zeros_like(tokens)
    for back in range(int(order.max())):
        token = F.pad(tokens, (back, 0))[:, : tokens.shape[1]]
        rows = rows + token * vocabulary**back * (back < order).unsqueeze(1)
    return rows


@register("learner", "bigram_backcopy", family="recall", papers=("2410.13835",), cases=())
@dataclass(frozen=True, eq=False)
class BigramBackcopyLearner(TokenLearner):
    """Known bigrams, and after a trigger the token before it: exact for the task bigram_backcopy (2410.13835).

    transition: probabilities of the next token, [vocabulary, vocabulary]; a learned model keeps them in its weights.
    triggers: ids of the triggers, [k] int64.
    """

    transition: Tensor
    triggers: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transition.shape != (self.vocabulary, self.vocabulary):
            size = self.vocabulary
            raise InputError(
                f"transition of shape {list(self.transition.shape)}: vocabulary {size} needs [{size}, {size}]"
            )

    def answer(self, tokens: Tensor) -> Tensor:
        logits = self.transition.to(tokens.device).clamp(min=1e-30).log().float()[tokens]
        before = F.pad(tokens[:, :-1], (1, 0))
        copies = torch.isin(tokens, self.triggers.to(tokens.device))
        copies[:, 0] = False
        return torch.where(copies.unsqueeze(-1), sure_of(before, copies, self.vocabulary), logits)
