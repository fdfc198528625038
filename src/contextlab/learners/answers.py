"""Answers as log-probabilities, of learners that know the answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMOOTHING = 1e-6
"""Probability that a learner that knows the answer leaves to all others together: keeps log-probabilities finite."""


def sure_of(answer: Tensor, known: Tensor | None, vocabulary: int) -> Tensor:
    """Log-probabilities [..., vocabulary], float32: nearly all of the probability on the answer.

    answer: [...] int64. known: [...] bool, where there is one; elsewhere all tokens are equally likely. None:
    everywhere.
    """
    rest = math.log(SMOOTHING / max(vocabulary - 1, 1))  # a vocabulary of one token does not divide by zero
    logits = torch.full((*answer.shape, vocabulary), rest, device=answer.device)
    logits.scatter_(-1, answer.unsqueeze(-1), math.log1p(-SMOOTHING))
    return logits if known is None else torch.where(known.unsqueeze(-1), logits, -math.log(vocabulary))
