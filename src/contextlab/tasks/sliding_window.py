"""Sequential functions: what is asked for depends on the last few inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.bayes import BasisPosterior
from contextlab.learners.regression import LeastSquares, NearestNeighbours, Ridge
from contextlab.learners.time_series import lags
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.base import Drawn, ExamplesTask
from contextlab.tasks.regression import NOISELESS


@dataclass(frozen=True)
class Windows:
    """Each input with those before it, `width` in all: [B, n, d] -> [B, n, width * d]; zero before the first."""

    width: int

    def __call__(self, xs: Tensor) -> Tensor:
        return torch.cat([xs, lags(xs, self.width - 1)], -1) if self.width > 1 else xs


@register(
    "task",
    "sliding_window",
    family="functions",
    papers=("2312.12655",),
    cases=({"dimensions": 2, "examples": 24}, {"width": 2, "examples": 16, "noise": 0.5, "layout": "interleaved"}),
)
@dataclass(frozen=True)
class SlidingWindow(ExamplesTask):
    """Sequential functions: y_i depends on the last few inputs, y_i = sum_j w_j . x_{i-j} + noise, j < width.

    The inputs are N(0, I), zero before the first, and the weights N(0, 1 / width), new for each prompt. To predict well
    is to know the order of the examples: regression on x_i alone explains 1 / width of y. (After the sliding windows of
    2312.12655, of which we know the summary only; sizes and distributions are ours.)

    width: inputs that y depends on, x_i among them.
    noise: standard deviation of the noise on y.
    order: "sequential"; "shuffled" shows the same examples in a random order, which hides the windows.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 1, "width": 2, "examples": 16},
        "hard": {"dimensions": 5, "width": 5, "examples": 80, "noise": 0.5},
    }

    dimensions: PositiveInt = 3
    width: PositiveInt = 3
    noise: NonNegativeFloat = 0.0
    order: Literal["sequential", "shuffled"] = "sequential"

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        xs = torch.randn(batch, self.examples, self.dimensions, generator=generator, device=device)
        ys, hidden = self._outputs(xs, generator)
        if self.order == "shuffled":
            places = torch.rand(batch, self.examples, 1, generator=generator, device=device).argsort(1)
            xs, ys = xs.gather(1, places.expand_as(xs)), ys.gather(1, places)
        return Drawn(xs, ys, hidden=hidden)

    def _outputs(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        shape = (len(xs), self.width * self.dimensions, 1)
        weights = torch.randn(shape, generator=generator, device=xs.device) / math.sqrt(self.width)
        ys = Windows(self.width)(xs) @ weights
        if self.noise:
            ys = ys + self.noise * torch.randn(ys.shape, generator=generator, device=xs.device)
        return ys, {"weights": weights}

    def another(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.order == "shuffled":
            raise InputError("corrupt: of shuffled examples the windows are not known; use order 'sequential'")
        return self._outputs(xs, generator)

    def learners(self) -> dict[str, Learner]:
        """In sequence `bayes` is exact; of shuffled examples x alone tells something, all else is noise."""
        noise = max(self.noise, NOISELESS)
        scale = 1 / math.sqrt(self.width)
        window = BasisPosterior(Windows(self.width), noise, scale)
        hidden = (self.width - 1) / self.width * self.dimensions  # variance of y that x_i does not explain
        alone = Ridge(self.width * (noise**2 + hidden))
        rest: dict[str, Learner] = {"ols": LeastSquares(), "knn": NearestNeighbours()}
        if self.order == "shuffled":
            return {"current_input": alone, "window": window, **rest}
        return {"bayes": window, "current_input": alone, **rest}

    def splits(self) -> dict[str, Task]:
        """'train', other noise, more examples, another width, and the same examples out of order (or in it)."""
        return {
            "train": self,
            "other noise": self.replace(noise=4 * self.noise if self.noise else 0.5),
            "more examples": self.replace(examples=2 * self.examples),
            f"width={self.width + 1}": self.replace(width=self.width + 1),
            "other order": self.replace(order="sequential" if self.order == "shuffled" else "shuffled"),
        }

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero; the first windows are short."""
        filled = sum(min(i, self.width) for i in range(1, self.examples + 1)) / self.examples
        return {"squared_error": self.dimensions * filled / self.width + self.noise**2}
