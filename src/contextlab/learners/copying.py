"""Exact evaluators of copying and look-up: programs that know the layout of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.learners.answers import sure_of
from contextlab.learners.ngrams import TokenLearner, last_seen
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register


@register("learner", "copier", family="recall", papers=("2402.01032",), cases=({"vocabulary": 8, "bar": 6, "end": 7},))
@dataclass(frozen=True)
class Copier(TokenLearner):
    """Copies the string before the bar, from its beginning or from where the tokens after the bar first stood in it.

    The prompt is a token of beginning, a string, the bar, `ngram` tokens, and the copy as far as it has come. Exact for
    the task copy. Positions before the copy, and strings without those tokens, get the uniform distribution.

    bar: id of the token that ends the string.
    end: id of the token that is predicted when the string has been copied.
    ngram: tokens between the bar and the copy.
    """

    bar: NonNegativeInt
    end: NonNegativeInt
    ngram: NonNegativeInt = 0

    def answer(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        at = torch.arange(length, device=tokens.device)
        is_bar = tokens == self.bar
        bar = torch.where(is_bar.any(1), is_bar.int().argmax(1), length).unsqueeze(1)
        query = bar + torch.arange(1, self.ngram + 1, device=tokens.device)
        start = first_match(tokens, tokens.gather(1, query.clamp(max=length - 1)), bar - self.ngram)
        # The tokens after the bar are those from `start` on, so the next one stands as far after it.
        source = start + at - bar
        known = (at >= bar + self.ngram) & (start >= 1) & (source <= bar)
        said = torch.where(source == bar, self.end, tokens.gather(1, source.clamp(0, length - 1)))
        return sure_of(said, known, self.vocabulary)


def first_match(tokens: Tensor, query: Tensor, last: Tensor) -> Tensor:
    """Where `query` first stands in `tokens`, after the first token and starting at most at `last`; [B, 1] int64.

    -1 where it does not. tokens: [B, T]. query: [B, n], n < T; an empty one stands everywhere. last: [B, 1].
    """
    size = query.shape[1]
    starts = torch.arange(tokens.shape[1] - size, device=tokens.device)
    same = (starts >= 1) & (starts <= last)
    for i in range(size):
        same = same & (tokens[:, i : i + len(starts)] == query[:, i : i + 1])
    return torch.where(same.any(1), same.int().argmax(1), -1).unsqueeze(1)


@register(
    "learner",
    "selective_copier",
    family="recall",
    papers=("2403.17844",),
    cases=({"vocabulary": 8, "blank": 6, "marker": 7},),
)
@dataclass(frozen=True)
class SelectiveCopier(TokenLearner):
    """After the marker, the first token that was not blank, then the second, and so on. Exact for selective_copy.

    The marker and positions for which no token is left get the uniform distribution.

    blank: id of the tokens that are passed over.
    marker: id of the token after which the copy begins.
    """

    blank: NonNegativeInt
    marker: NonNegativeInt

    def answer(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        since = (tokens == self.marker).int().cumsum(1)
        shown = (tokens != self.blank) & (since == 0)
        rank = shown.int().cumsum(1) - 1
        # the i-th token shown, in place i; a last place takes all others
        place = torch.where(shown, rank, length)
        kept = torch.zeros(tokens.shape[0], length + 1, dtype=tokens.dtype, device=tokens.device)
        kept = kept.scatter_(1, place, tokens)[:, :length]
        turn = (since > 0).int().cumsum(1) - 2  # the marker itself asks for nothing
        known = (turn >= 0) & (turn <= rank)
        return sure_of(kept.gather(1, turn.clamp(min=0)), known, self.vocabulary)


@register("learner", "segment_lookup", family="recall", papers=("2403.17844",), cases=({"vocabulary": 16, "keys": 7},))
@dataclass(frozen=True)
class SegmentLookup(TokenLearner):
    """Look-up by a key of several tokens, of a value of several: what followed the same words since the key began.

    Ids below `keys` are key symbols. A segment begins at a key symbol that follows another kind of token, and the
    prediction is what followed the last earlier place at which the segment had read the same, if that was no key
    symbol (there, a longer key was being read). Exact for fuzzy recall, for values of several tokens, and for names
    with numbers. Segments that are new get the uniform distribution.

    keys: number of key symbols.
    """

    keys: PositiveInt

    def answer(self, tokens: Tensor) -> Tensor:
        is_key = tokens < self.keys
        begins = is_key & ~F.pad(is_key[:, :-1], (1, 0))
        at = torch.arange(tokens.shape[1], device=tokens.device)
        since = torch.where(begins, at, -1).cummax(1).values
        ids = torch.where(since >= 0, spans(tokens, at - since.clamp(min=0) + 1), -1)
        # A place at which a key symbol follows is no example of an answer.
        seen = last_seen(ids, ~F.pad(is_key[:, 1:], (0, 1), value=True))
        said = tokens.gather(1, (seen + 1).clamp(max=tokens.shape[1] - 1))
        return sure_of(said, seen >= 0, self.vocabulary)


def spans(tokens: Tensor, sizes: Tensor) -> Tensor:
    """A number for the last sizes[b, t] >= 1 tokens at each position, [B, T]: equal where these tokens are.

    Numbers for 1, 2, 4, ... tokens are made each from the one before; two of those, which may overlap, cover a span.
    """
    length = tokens.shape[1]
    sizes = sizes.expand_as(tokens)
    at = torch.arange(length, device=tokens.device)
    block = first = last = tokens  # first and last: the blocks at the beginning and at the end of the span
    reach = 1
    while 2 * reach <= int(sizes.max()):
        block = _pairs(F.pad(block, (reach, 0))[:, :length], block)
        reach *= 2
        fits = sizes >= reach
        first = torch.where(fits, block.gather(1, (at - sizes + reach).clamp(0, length - 1)), first)
        last = torch.where(fits, block, last)
    return _pairs(_pairs(first, last), sizes)


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    """A number for each pair of numbers, small and equal where the pairs are."""
    return torch.unique(left * (int(right.max()) + 1) + right, return_inverse=True)[1]


@register(
    "learner",
    "chained_lookup",
    family="recall",
    papers=("2312.04927",),
    cases=({"vocabulary": 16, "pairs": 4, "hops": 2},),
)
@dataclass(frozen=True)
class ChainedLookup(TokenLearner):
    """Looks the current token up among the pairs at the beginning, then what it found, `hops` times.

    Exact for chained_recall. Positions within the pairs, and chains that break off, get the uniform distribution.

    pairs: pairs of tokens at the beginning of the prompt.
    hops: times to look up.
    """

    pairs: PositiveInt
    hops: PositiveInt = 1

    def answer(self, tokens: Tensor) -> Tensor:
        keys, values = tokens[:, 0 : 2 * self.pairs : 2], tokens[:, 1 : 2 * self.pairs : 2]
        # -1, at the end, is bound to itself: nothing
        bound = torch.full((tokens.shape[0], self.vocabulary + 1), -1, device=tokens.device).scatter_(1, keys, values)
        found = tokens
        for _ in range(self.hops):
            found = bound.gather(1, found % (self.vocabulary + 1))
        after = torch.arange(tokens.shape[1], device=tokens.device) >= 2 * self.pairs
        return sure_of(found.clamp(min=0), (found >= 0) & after, self.vocabulary)


@register("learner", "memorized_pairs", family="recall", papers=("2403.17844",), cases=())
@dataclass(frozen=True, eq=False)
class MemorizedPairs(TokenLearner):
    """What a model keeps in its weights: the fixed value of the token before, whatever the prompt shows.

    table: the value of each token, [vocabulary] int64; -1 for a token without one, after which the answer is uniform.
    """

    table: Tensor

    def answer(self, tokens: Tensor) -> Tensor:
        value = F.pad(self.table.to(tokens.device)[tokens][:, :-1], (1, 0), value=-1)
        return sure_of(value.clamp(min=0), value >= 0, self.vocabulary)


@register(
    "learner", "perfect_memory", family="recall", papers=("2403.17844",), cases=({"vocabulary": 16, "places": 31},)
)
@dataclass(frozen=True)
class PerfectMemory(Learner):
    """Predicts at each position all tokens so far, as an unbounded state could. Exact for compression.

    Places that were not reached yet get the uniform distribution.

    vocabulary: number of symbols.
    places: tokens to say.
    """

    vocabulary: PositiveInt
    places: PositiveInt

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, places * vocabulary], float32: those of one place after those of another."""
        tokens = token_ids(prompt, self.vocabulary, "perfect_memory")
        batch, length = tokens.shape
        shown = tokens[:, None, : self.places].expand(-1, length, -1)
        at, place = torch.arange(length, device=tokens.device), torch.arange(self.places, device=tokens.device)
        known = (at[:, None] >= place).expand(batch, -1, -1)
        return sure_of(shown.flatten(0, 1), known.flatten(0, 1), self.vocabulary).view(batch, length, -1)
