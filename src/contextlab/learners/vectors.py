"""Learners of vector_recall: look up the value of the most similar key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register


@register(
    "learner",
    "vector_lookup",
    family="recall",
    papers=("2402.04248",),
    cases=({"pairs": 8}, {"pairs": 8, "temperature": 2.0}),
)
@dataclass(frozen=True)
class VectorLookup(Learner):
    """The value of the key with the largest inner product with the current vector, among the keys before.

    The prompt's first 2 * pairs tokens are keys and values in turn. A token before the first value gets zero.

    pairs: key-value pairs.
    temperature: the softmax of the inner products over it weighs the values; None for the best key alone.
    """

    pairs: PositiveInt
    temperature: PositiveFloat | None = None

    def __call__(self, prompt: Prompt) -> Tensor:
        """Predictions [B, T, d]. Raises InputError for a prompt of tokens, or too short for the pairs."""
        tokens = prompt.inputs
        if not tokens.is_floating_point() or tokens.shape[1] < 2 * self.pairs:
            raise InputError(
                f"vector_lookup needs vectors, at least {2 * self.pairs} for {self.pairs} pairs, as vector_recall draws"
            )
        keys, values = tokens[:, 0 : 2 * self.pairs : 2], tokens[:, 1 : 2 * self.pairs : 2]
        product = (tokens @ keys.mT).double()
        # pair p is known from its value on, at 2 p + 1
        known = torch.arange(tokens.shape[1], device=tokens.device)[:, None] >= (
            2 * torch.arange(self.pairs, device=tokens.device) + 1
        )
        product = product.masked_fill(~known, -torch.inf)
        if self.temperature is None:
            weight = torch.zeros_like(product).scatter_(2, product.argmax(2, keepdim=True), 1.0)
        else:
            weight = (product / self.temperature).softmax(2)
        return torch.where(known.any(1)[:, None], weight.to(tokens), 0.0) @ values
