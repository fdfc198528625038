"""Series to be forecast in context: what all of them share, and autoregressions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.regression import NearestNeighbours
from contextlab.learners.time_series import ARLeastSquares, ARPosterior, LastValue, lags, normal_points, stable
from contextlab.prompt import Learner, Prompt, Task, wide
from contextlab.registry import register
from contextlab.tasks.averages import mean_of, strides
from contextlab.tasks.base import check_options

LEAST_STABLE = 0.05
"""Share of coefficient vectors that must be stable: drawing stable ones tries about 1 / LEAST_STABLE of them each."""


@dataclass(frozen=True)
class ForecastTask(Task):
    """Base: a series whose next value is to be predicted at every time; squared error, summed over coordinates.

    Subclasses define `series`. At time t the model reads the values before t (zero before the start) and predicts
    value t. Learners find value t in `Prompt.ys`, and what it may depend on in `Prompt.xs`.

    length: values in a series.
    noise: standard deviation of the noise on each coordinate.
    window: values that a token shows, the latest first: 1 for the plain series, more for sliding windows.
    """

    metric: ClassVar[str] = "squared_error"

    length: PositiveInt = 64
    noise: NonNegativeFloat = 1.0
    window: PositiveInt = 1

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def input_size(self) -> int:
        return self.window * self.output_size

    @property
    def output_size(self) -> int:
        return 1

    @property
    def first(self) -> int:
        """The first time that is scored; `shot` counts the values from here."""
        return 0

    @abstractmethod
    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [batch, length, k], and what drew them."""

    def regressors(self, values: Tensor) -> Tensor:
        """`Prompt.xs`: what value t may depend on, [B, T, d]; the value before, unless a task says otherwise."""
        return lags(values, 1)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts, float32, T = length."""
        values, hidden = self.series(batch, generator, device)
        at = torch.arange(self.length, device=values.device)
        return Prompt(
            lags(values, self.window),
            values,
            (at >= self.first).expand(batch, -1),
            (at - self.first).clamp_min(0).expand(batch, -1),
            self.regressors(values),
            values,
            at,
            hidden,
        )

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean squared error over the scored positions, summed over coordinates. prediction: [B, T, k]."""
        square = (wide(prediction) - prompt.targets).square().sum(-1)
        return (square * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """squared_error [B, T], summed over coordinates (so at least noise^2 for each on average)."""
        return {"squared_error": (wide(prediction) - prompt.targets).square().sum(-1)}

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The series, a value a line, `[..]` where it is to be predicted."""
        lines = []
        for t, (value, scored) in enumerate(
            zip(prompt.targets[row].tolist(), prompt.scored[row].tolist(), strict=True)
        ):
            shown = " ".join(f"{number: .2f}" for number in value[:8]) + (" ..." if len(value) > 8 else "")
            lines.append(f"t={t:<3} " + (f"[{shown}]" if scored else f" {shown}"))
        return "\n".join(lines)

    def splits(self) -> dict[str, Task]:
        """'train', other noise, twice the length."""
        return {
            "train": self,
            "other noise": self.replace(noise=3 * self.noise if self.noise else 0.1),
            "longer": self.replace(length=2 * self.length),
        }


@register(
    "task",
    "autoregression",
    family="functions",
    papers=("2510.09776",),
    cases=({"length": 24}, {"order": 1, "length": 16, "noise": 0.3}, {"order": 4, "length": 24, "window": 4}),
)
@dataclass(frozen=True)
class Autoregression(ForecastTask):
    """AR(p) series: x_t = sum_j c_j x_{t-j} + noise, new stationary coefficients for each prompt.

    The coefficients are N(0, scale^2 / p), drawn again until they are stable, and the first p values are noise. (The
    data of 2510.09776 have coefficients uniform in [-0.9, 0.9], drawn until stable, and first values of the stationary
    variance, all prompts windows of one series. A Gaussian prior has an exact predictor.) A token that shows `order`
    values is a column of the Hankel matrix that the paper's linear attention reads. Least squares needs about 2 p
    values; the posterior knows the prior, too.

    order: p, the values before that the next one depends on.
    scale: root of the coefficients' sum of squares, on average before the restriction to stable ones.
    length: values in a series.
    noise: standard deviation of the noise.
    window: values that a token shows, the latest first.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"order": 1, "length": 32},
        "hard": {"order": 6, "length": 96},
    }

    noise: PositiveFloat = 1.0
    order: PositiveInt = 3
    scale: PositiveFloat = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length <= self.order:
            raise InputError(
                f"length {self.length} leaves nothing to predict from order {self.order}; at least {self.order + 1}"
            )
        if (share := _stable_share(self.order, self.deviation)) < LEAST_STABLE:
            raise InputError(
                f"scale {self.scale:g} makes {share:.1%} of the coefficients of order {self.order} stable; at least "
                f"{LEAST_STABLE:.0%} must be, as for a scale of 0.5 or less"
            )

    @property
    def deviation(self) -> float:
        """Standard deviation of a coefficient before the restriction."""
        return self.scale / math.sqrt(self.order)

    @property
    def first(self) -> int:
        return self.order

    def regressors(self, values: Tensor) -> Tensor:
        return lags(values, self.order)

    def coefficients(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Stable ones, the latest value's first, [batch, order]."""
        found = self.deviation * torch.randn(batch, self.order, generator=generator, device=device)
        while (outside := (~stable(found)).nonzero().squeeze(1)).numel():
            again = torch.randn(len(outside), self.order, generator=generator, device=device)
            found[outside] = self.deviation * again
        return found

    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        coefficients = self.coefficients(batch, generator, device)
        values = self.noise * torch.randn(batch, self.length, generator=generator, device=device)
        earliest_first = coefficients.flip(1)
        for t in range(self.order, self.length):
            values[:, t] += (earliest_first * values[:, t - self.order : t]).sum(1)
        return values.unsqueeze(-1), {"coefficients": coefficients}

    def learners(self) -> dict[str, Learner]:
        """`bayes` knows the prior and the restriction to stable coefficients; `ridge` knows the prior alone."""
        return {
            "bayes": ARPosterior(self.order, self.noise, self.deviation),
            "ridge": ARLeastSquares(self.order, (self.noise / self.deviation) ** 2),
            "least_squares": ARLeastSquares(self.order),
            "least_squares, order 1": ARLeastSquares(1),
            "last_value": LastValue(),
            "knn": NearestNeighbours(),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every series, weaker dependence, and twice the order."""
        found = super().splits() | {"weaker": self.replace(scale=self.scale / 2)}
        share = _stable_share(2 * self.order, self.scale / math.sqrt(2 * self.order))
        if self.length > 2 * self.order and share >= LEAST_STABLE:
            found["twice the order"] = self.replace(order=2 * self.order)
        return found

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero, from 2^14 quasi-random processes (within about 1%)."""
        return {"squared_error": self.noise**2 * _mean_square(self.order, self.deviation, self.length)}


@lru_cache(maxsize=64)
def _stable_share(order: int, deviation: float) -> float:
    return stable(normal_points(2**12, order) * deviation).double().mean().item()


@lru_cache(maxsize=64)
def _mean_square(order: int, deviation: float, length: int) -> float:
    """The mean of E x_t^2 over t >= order, for noise of variance 1."""
    coefficients = normal_points(2**14, order) * deviation
    coefficients = coefficients[stable(coefficients)]
    # Covariance of the last `order` values, the latest first, and its step to the next time.
    covariance = torch.eye(order, dtype=torch.float64).expand(len(coefficients), -1, -1)
    companion = torch.eye(order, dtype=torch.float64)[:-1]  # each value moves down
    step = torch.cat([coefficients.unsqueeze(1), companion.expand(len(coefficients), -1, -1)], 1)
    shock = torch.zeros(order, order, dtype=torch.float64)
    shock[0, 0] = 1
    powers = [(step, shock)]  # of two: (step^s, what the shocks of s times add)

    def after(s: int) -> None:
        nonlocal covariance
        while len(powers) < s.bit_length():
            one, added = powers[-1]
            powers.append((one @ one, one @ added @ one.mT + added))
        one, added = powers[s.bit_length() - 1]
        covariance = one @ covariance @ one.mT + added

    after(1)
    squares = {0: covariance[:, 0, 0].mean().item()}
    at = 0
    for stride in strides(length - order):
        after(stride)
        at += stride
        squares[at] = covariance[:, 0, 0].mean().item()
    return mean_of(squares.__getitem__, length - order)
