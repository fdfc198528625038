"""Naive Bayes: which of a few classes a text is of, or whether two texts are of one class."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

BYTES = 256


STRENGTH = 100.0
"""Counts that what a class's bytes are shrunk to is worth; 10 to 1,000 do about as well."""


def byte_likelihoods(classes: Iterable[Iterable[Tensor]], order: Literal[1, 2]) -> Tensor:
    """Log-probabilities of a byte in each class, [classes, contexts, 256] float64: shrunken relative counts.

    Those of a class are shrunk to those of all classes together, so that what no class has shown tells nothing.

    order: 1 for bytes alone (one context), 2 for a byte after another: context a is byte a, and context 256 is none,
        where bytes are counted alone.
    classes: the documents of each class, ids of bytes.
    """
    counts = torch.stack([_counts(documents, order) for documents in classes])
    pool = counts.sum(0)
    alone = _shrunk(pool[-1:], torch.full((1, BYTES), 1 / BYTES, dtype=torch.float64))
    return _shrunk(counts, torch.cat([_shrunk(pool[:-1], alone), alone])).log()


def _counts(documents: Iterable[Tensor], order: Literal[1, 2]) -> Tensor:
    alone = torch.zeros(1, BYTES, dtype=torch.float64)
    pairs = torch.zeros(BYTES if order == 2 else 0, BYTES, dtype=torch.float64)
    for document in documents:
        ids = document.long()
        alone += torch.bincount(ids, minlength=BYTES)
        if order == 2:
            pairs += torch.bincount(ids[:-1] * BYTES + ids[1:], minlength=BYTES**2).view(BYTES, BYTES)
    return torch.cat([pairs, alone])


def _shrunk(counts: Tensor, prior: Tensor) -> Tensor:
    """The mean of a Dirichlet posterior."""
    return (counts + STRENGTH * prior) / (counts.sum(-1, keepdim=True) + STRENGTH)


@register("learner", "naive_bayes", family="text", papers=("2011.04006",), cases=())
@dataclass(frozen=True, eq=False)
class NaiveBayes(Learner):
    """The class of a text of bytes, from how likely each class makes its bytes; classes are equally likely a priori.

    The probability of class c, label 256 + c, at every position given the bytes up to it. Bytes of one document are
    less than independent evidence: that of m bytes counts as that of m / (1 + (m - 1) * correlation) (what a cluster
    of m correlated observations is worth); no correlation is the usual naive Bayes, which is overconfident.

    likelihoods: [classes, contexts, 256], see `byte_likelihoods`.
    correlation: between the evidence of two bytes of a document, 0 to 1.
    """

    likelihoods: Tensor
    correlation: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        classes, contexts, size = shape = self.likelihoods.shape
        if classes < 2 or contexts not in (1, BYTES + 1) or size != BYTES:
            raise InputError(
                f"likelihoods of shape {list(shape)}: expected [classes, 1 or 257, 256], at least 2 classes"
            )

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return BYTES + len(self.likelihoods)

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary], float32. Raises InputError for prompts that are no token ids."""
        tokens = token_ids(prompt, self.vocabulary, "naive_bayes")
        return self._labelled(self._posterior(tokens, tokens < BYTES))

    def _posterior(self, tokens: Tensor, counted: Tensor) -> Tensor:
        """Log-probabilities of the classes [B, T, classes], float64, given the counted bytes up to each position."""
        table = self.likelihoods.to(tokens.device).flatten(1).T
        place = tokens.clamp(max=BYTES - 1)
        if self.likelihoods.shape[1] > 1:
            before = F.pad(tokens[:, :-1].clamp(max=BYTES), (1, 0), value=BYTES)
            place = place + BYTES * before
        evidence = (table[place] * counted.unsqueeze(2)).cumsum(1)
        number = counted.long().cumsum(1).clamp_min(1).unsqueeze(2)
        return (evidence / (1 + (number - 1) * self.correlation)).log_softmax(2)

    def _labelled(self, labels: Tensor) -> Tensor:
        """The log-probabilities of all tokens from those of the last ones."""
        rest = self.vocabulary - labels.shape[2]
        return F.pad(labels.float() + math.log1p(-SMOOTHING), (rest, 0), value=math.log(SMOOTHING / rest))


@register("learner", "naive_bayes_pairs", family="text", papers=("2011.04006",), cases=())
@dataclass(frozen=True, eq=False)
class NaiveBayesPairs(NaiveBayes):
    """Whether two texts of bytes are of one class, labels 257 (no) and 258 (yes), from naive Bayes of each.

    Token 256 separates the texts. A priori both answers are equally likely, and so are all classes of the first text
    and, where the classes differ, all others of the second.

    likelihoods: [classes, contexts, 256], see `byte_likelihoods`.
    correlation: between the evidence of two bytes of a document, 0 to 1.
    """

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return BYTES + 3

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, 259], float32. Raises InputError for prompts that are no token ids."""
        tokens = token_ids(prompt, self.vocabulary, "naive_bayes_pairs")
        second = (tokens == BYTES).cumsum(1) > 0
        one, two = (self._posterior(tokens, (tokens < BYTES) & part) for part in (~second, second))
        classes = one.shape[2]
        equal = torch.eye(classes, dtype=torch.bool, device=tokens.device)
        pairs = (one.unsqueeze(3) + two.unsqueeze(2)).masked_fill(equal, -math.inf)
        same = (one + two).logsumexp(2)
        different = pairs.flatten(2).logsumexp(2) - math.log(classes - 1)
        return self._labelled(torch.stack([different, same], 2).log_softmax(2))
