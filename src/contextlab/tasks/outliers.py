"""Linear regression with outliers that must be ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.outliers import FilteredRidge
from contextlab.learners.regression import NearestNeighbours, Ridge
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.base import Drawn
from contextlab.tasks.functions import FunctionTask


@register(
    "task",
    "outlier_regression",
    family="functions",
    papers=("2402.04248",),
    cases=({"dimensions": 4, "examples": 24}, {"dimensions": 5, "examples": 24, "outliers": "orthogonal"}),
)
@dataclass(frozen=True)
class OutlierRegression(FunctionTask):
    """Linear regression, y = w . x with w ~ N(0, I), where many examples tell nothing of w (MambaFormer, 2402.04248).

    Each example but the last is an outlier with probability `rate`; outliers are in the context and not scored.
    "ones": x and y are 1 throughout. "orthogonal": x is one random vector of the prompt, orthogonal to w, and y is
    one random number of the prompt (in the authors' code w is another prompt's, and y is a vector).

    noise: standard deviation of the noise on y, not on outliers.
    active_dimensions: x is zero beyond so many dimensions, but for outliers; None for all.
    rate: probability of an outlier.
    outliers: "ones" or "orthogonal".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "examples": 24},
        "hard": {"examples": 512, "rate": 0.9},
        "orthogonal": {"examples": 101, "outliers": "orthogonal"},
    }

    examples: PositiveInt = 100
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    outliers: Literal["ones", "orthogonal"] = "ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers == "orthogonal" and self.dimensions < 2:
            raise InputError("dimensions 1 leaves no direction orthogonal to the weights; use at least 2")

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        drawn = super().draw(batch, generator, device)
        assert drawn.hidden is not None
        away = torch.rand(batch, self.examples, generator=generator, device=device) < self.rate
        away[:, -1] = False
        x, y = torch.ones(batch, self.dimensions, device=device), torch.ones(batch, 1, device=device)
        if self.outliers == "orthogonal":
            w = drawn.hidden["weights"].squeeze(-1)
            x = torch.randn(batch, self.dimensions, generator=generator, device=device)
            x = self.input_scale * (x - w * ((x * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)))
            y = math.sqrt(self.square()) * torch.randn(batch, 1, generator=generator, device=device)
        xs = torch.where(away.unsqueeze(-1), x.unsqueeze(1), drawn.xs)
        ys = torch.where(away.unsqueeze(-1), y.unsqueeze(1), drawn.ys)
        return Drawn(xs, ys, ~away, drawn.hidden)

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.randn(len(xs), self.dimensions, 1, generator=generator, device=xs.device)
        return xs @ weights, {"weights": weights}

    def square(self) -> float:
        return self.active * self.input_scale**2

    def learners(self) -> dict[str, Learner]:
        """`filtered_ridge`: exact for "ones"; an orthogonal outlier misleads it until it comes a second time."""
        strength = self.assumed_noise() ** 2
        return {
            "filtered_ridge": FilteredRidge("ones" if self.outliers == "ones" else "repeated", strength),
            "ridge": Ridge(strength),
            "knn": NearestNeighbours(),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every function class, no outliers, more outliers, and the other kind."""
        other = "orthogonal" if self.outliers == "ones" else "ones"
        found = super().splits() | {"more outliers": self.replace(rate=(1 + self.rate) / 2)}
        if self.rate:
            found["no outliers"] = self.replace(rate=0.0)
        if self.dimensions > 1:
            found[f"{other} outliers"] = self.replace(outliers=other)
        return found
