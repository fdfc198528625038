"""The class of the nearest known images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

PART = 2**26
"""Distances that are held at once."""


@register("learner", "pixel_neighbours", family="images", papers=(), cases=())
@dataclass(frozen=True, eq=False)
class PixelNeighbours(Learner):
    """A vote of the nearest known images (Euclidean, over grey levels), each with a weight by how near it is.

    The weight is exp(-d^2 / s), s the distance squared of the nearest one times `width`. An image that is equal to the
    prompt's is left out, so that training images do not find themselves.

    known: [N, pixels] int64, grey levels. labels: [N] int64. levels: grey levels; the ids of labels follow them.
    classes: how many. neighbours: that have a vote.
    """

    known: Tensor
    labels: Tensor
    levels: Annotated[int, Field(ge=2)]
    classes: PositiveInt
    neighbours: PositiveInt = 8
    width: Annotated[float, Field(gt=0)] = 0.25

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, pixels, levels + classes], float32: at the last pixel of the labels."""
        vocabulary = self.levels + self.classes
        tokens = token_ids(prompt, vocabulary, "pixel_neighbours")
        if tokens.shape[1] != self.known.shape[1]:
            raise InputError(
                f"pixel_neighbours knows images of {self.known.shape[1]} pixels, this one has {tokens.shape[1]}"
            )
        known, labels = self.known.to(tokens.device).float(), self.labels.to(tokens.device)
        votes = torch.cat([self._votes(part.float(), known, labels) for part in tokens.split(PART // len(known) + 1)])
        share = (votes + 0.02 / self.classes) / 1.02
        log = torch.full((*tokens.shape, vocabulary), -math.log(vocabulary), device=tokens.device)
        log[:, -1] = math.log(SMOOTHING / self.levels)
        log[:, -1, self.levels :] = share.log() + math.log1p(-SMOOTHING)
        return log

    def _votes(self, images: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        """The share of each class, [B, classes]."""
        square = images.square().sum(1, keepdim=True) - 2 * images @ known.T + known.square().sum(1)
        square = square.masked_fill(square < 0.5, math.inf)  # distances between whole numbers: it is equal
        near, which = square.topk(min(self.neighbours, len(known)), largest=False)
        scale = (self.width * near[:, :1]).clamp(1e-12, 1e12)
        weight = torch.softmax(-near.clamp_max(1e12) / scale, 1)
        return torch.zeros(len(images), self.classes, device=images.device).scatter_add_(1, labels[which], weight)
