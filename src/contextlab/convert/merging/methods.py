"""Averages, task vectors, signs, great circles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from contextlab.convert.merging.base import Merge, Tensors
from contextlab.errors import InputError
from contextlab.models import ModelSpec
from contextlab.registry import register

PARALLEL = 0.9995
"""|cos| of two tensors from which on a straight line is taken, as in mergekit."""


@register("conversion", "average", family="merge", papers=("2203.05482",), cases=({}, {"weights": (3.0, 1.0)}))
@dataclass(frozen=True)
class Average(Merge):
    """The mean of the models' weights (a uniform soup, 2203.05482), or a weighted one.

    weights: of each model, in order; what counts is their share of the sum. Null counts all alike.
    """

    weights: tuple[NonNegativeFloat, ...] | None = None

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Merge.plan`."""
        count = len(self.others) + 1
        if self.weights is not None and (len(self.weights) != count or not sum(self.weights)):
            raise InputError(f"weights: expected {count}, one for each model, not all 0, got {list(self.weights)}")
        return super().plan(spec)

    def merged(self, models: Sequence[Tensors], base: Tensors | None) -> Tensors:
        """See `Merge.merged`, of any shape."""
        weights = self.weights or (1.0,) * len(models)
        return {
            name: sum((w * m[name] for w, m in zip(weights, models, strict=True)), torch.zeros_like(models[0][name]))
            / sum(weights)
            for name in models[0]
        }


@register(
    "conversion", "task_arithmetic", family="merge", papers=("2212.04089", "2310.04799"), cases=({}, {"scale": 1.0})
)
@dataclass(frozen=True)
class TaskArithmetic(Merge):
    """The base plus a part of the sum of task vectors, what each model differs from it by (2212.04089, section 2).

    scale: of the sum; the paper chooses it on validation data, and 0.4 serves without. 1 adds a chat vector to a model
        that was trained further (2310.04799).
    """

    wants_base: ClassVar[bool] = True

    scale: float = 0.4

    def merged(self, models: Sequence[Tensors], base: Tensors | None) -> Tensors:
        """See `Merge.merged`, of any shape."""
        assert base is not None
        return {n: base[n] + self.scale * torch.stack([m[n] - base[n] for m in models]).sum(0) for n in base}


@register("conversion", "ties", family="merge", papers=("2306.01708",), cases=({}, {"density": 0.5, "scale": 0.7}))
@dataclass(frozen=True)
class Ties(Merge):
    """Task vectors trimmed to their largest numbers, then averaged where they agree with the elected sign (2306.01708).

    A sign is that of the sum of the trimmed vectors, number by number. As in the paper, a model's whole task vector is
    trimmed at once; mergekit trims each tensor alone.

    density: share of a task vector's numbers that are kept.
    scale: of the merged task vector.
    """

    wants_base: ClassVar[bool] = True

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    scale: float = 1.0

    def merged(self, models: Sequence[Tensors], base: Tensors | None) -> Tensors:
        """See `Merge.merged`, of any shape."""
        assert base is not None
        vectors = torch.stack(
            [trimmed(torch.cat([(m[n] - base[n]).flatten() for n in base]), self.density) for m in models]
        )
        sign = vectors.sum(0).sign()
        agree = (vectors.sign() == sign) & (vectors != 0)
        mean = (vectors * agree).sum(0) / agree.sum(0).clamp_min(1)
        parts = mean.split([each.numel() for each in base.values()])
        return {n: t + self.scale * part.view_as(t) for (n, t), part in zip(base.items(), parts, strict=True)}


def trimmed(vector: Tensor, density: float) -> Tensor:
    """A vector [N] with its round(density x N) numbers of largest size, and zeros for the others."""
    kept = vector.abs().argsort(descending=True, stable=True)[: round(density * len(vector))]
    return torch.zeros_like(vector).index_copy(0, kept, vector[kept])


@register("conversion", "slerp", family="merge", cases=({}, {"t": 0.25}))
@dataclass(frozen=True)
class Slerp(Merge):
    """Of two models, each tensor on the great circle between them (spherical interpolation, as in mergekit).

    t: how far from the first model (0) to the other (1).
    """

    most: ClassVar[int | None] = 2

    t: Annotated[float, Field(ge=0, le=1)] = 0.5

    def merged(self, models: Sequence[Tensors], base: Tensors | None) -> Tensors:
        """See `Merge.merged`, of any shape."""
        first, second = models
        return {name: slerp(self.t, first[name], second[name]) for name in first}


def slerp(t: float, first: Tensor, second: Tensor) -> Tensor:
    """sin((1-t) a) / sin a x first + sin(t a) / sin a x second, with a the angle between the two.

    first, second: of any shape, which the answer has. Where they are all but parallel, or one is zero, it lies on the
    straight line.
    """
    norms = first.norm() * second.norm()
    cosine = (first * second).sum() / norms if float(norms) > 0 else first.new_tensor(1.0)
    if abs(float(cosine)) > PARALLEL:
        return (1 - t) * first + t * second
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - t) * angle).sin() * first + (t * angle).sin() * second) / angle.sin()
