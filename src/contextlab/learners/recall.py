"""Learners that answer recall prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import sure_of
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register


@register("learner", "lookup", family="recall", papers=("2312.04927",), cases=({"vocabulary": 128},))
@dataclass(frozen=True)
class Lookup(Learner):
    """Exact look-up: the token that followed the first occurrence of the current token.

    A token that is new gets the uniform distribution. Solves associative recall without error.

    vocabulary: number of symbols that can be predicted (the width of the logits).
    """

    vocabulary: PositiveInt

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary], float32. Raises InputError for other prompts."""
        tokens = prompt.inputs
        if tokens.is_floating_point():
            raise InputError(
                "lookup needs a prompt of token ids, such as associative_recall draws; this one has vectors"
            )
        if tokens.numel() and int(tokens.max()) >= self.vocabulary:
            raise InputError(f"lookup has vocabulary {self.vocabulary}, but the prompt holds token {int(tokens.max())}")
        batch, length = tokens.shape
        position = torch.arange(length, device=tokens.device).expand(batch, length)
        first = torch.full((batch, self.vocabulary), length, device=tokens.device)
        first = first.scatter_reduce(1, tokens, position, "amin").gather(1, tokens)  # never later than the token itself
        known = first < position
        answer = tokens.gather(1, (first + 1).clamp(max=length - 1))
        return sure_of(answer, known, self.vocabulary)
