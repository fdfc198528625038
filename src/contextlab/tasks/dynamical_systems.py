"""Random networks as dynamical systems, to be forecast in context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.regression import NearestNeighbours
from contextlab.learners.time_series import ARLeastSquares, LastValue
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.time_series import ForecastTask

MOST_SIMULATED = 512
"""States of a system that are simulated to find the mean square of many more."""


@register(
    "task",
    "dynamical_system",
    family="functions",
    papers=("2312.12655",),
    cases=({"dimensions": 3, "length": 24}, {"dimensions": 2, "length": 16, "gain": 1.0, "noise": 0.5, "window": 2}),
)
@dataclass(frozen=True)
class DynamicalSystem(ForecastTask):
    """Random networks as dynamical systems: x_t = W tanh(x_{t-1}) + noise, a new W for each prompt.

    W has entries N(0, gain^2 / d) and x_0 is N(0, I), so that values stay bounded, and without noise large systems are
    chaotic for gains well above 1. In tanh(x_{t-1}) the system is linear: Bayesian regression on it is exact. (The
    idea of learning sequential functions in context is that of 2312.12655; the systems are ours.)

    dimensions: d, coordinates of a state.
    gain: spread of W's entries, times sqrt(d).
    length: states in a series.
    noise: standard deviation of the noise on each coordinate.
    window: states that a token shows, the latest first.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 2, "length": 32},
        "hard": {"dimensions": 10, "length": 96, "gain": 3.0, "noise": 0.3},
    }

    noise: NonNegativeFloat = 0.1
    dimensions: PositiveInt = 5
    gain: PositiveFloat = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise InputError(f"length {self.length} leaves nothing to predict from the first state; at least 2")

    @property
    def output_size(self) -> int:
        return self.dimensions

    @property
    def first(self) -> int:
        return 1

    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        weights = self.gain / math.sqrt(self.dimensions) * normal(batch, self.dimensions, self.dimensions)
        states = [normal(batch, self.dimensions, 1)]
        for _ in range(1, self.length):
            states.append(weights @ states[-1].tanh() + self.noise * normal(batch, self.dimensions, 1))
        return torch.stack(states, 1).squeeze(-1), {"weights": weights}

    def learners(self) -> dict[str, Learner]:
        """`bayes` is exact; `linear` takes the system for a linear one."""
        strength = self.dimensions * (self.noise / self.gain) ** 2
        return {
            "bayes": ARLeastSquares(1, strength, "tanh"),
            "least_squares on tanh": ARLeastSquares(1, 0.0, "tanh"),
            "linear": ARLeastSquares(1, max(strength, 1e-3)),
            "knn": NearestNeighbours(1),
            "last_value": LastValue(),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every series, half and twice the gain."""
        gains = {f"gain={gain:g}": self.replace(gain=gain) for gain in (self.gain / 2, 2 * self.gain)}
        return super().splits() | gains

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero, from systems drawn once (within about 1%)."""
        return {"squared_error": _simulated_square(self.replace(window=1))}


@lru_cache(maxsize=32)
def _simulated_square(task: DynamicalSystem) -> float:
    short = task.replace(length=min(task.length, MOST_SIMULATED))
    values, _ = short.series(max(2**8, 2**16 // task.dimensions), torch.Generator().manual_seed(0), "cpu")
    squares = values[:, task.first :].double().square().sum(2)
    later = task.length - short.length  # by then a system has forgotten how it began
    rest = later * squares[:, squares.shape[1] // 2 :].mean().item() if later else 0.0
    return (squares.mean().item() * squares.shape[1] + rest) / (squares.shape[1] + later)
