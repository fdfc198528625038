"""Sums of sinusoids or of decaying exponentials, to be forecast in context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.bayes import BasisPosterior, BayesMixture, MemberOracle
from contextlab.learners.time_series import ARLeastSquares, LastValue
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.regression import NOISELESS
from contextlab.tasks.time_series import ForecastTask

MOST_MEMBERS = 512
"""Sets of frequencies that the exact posterior of `waves` weighs at most; its time grows with their number."""


@dataclass(frozen=True)
class Waves:
    """cos(w t), sin(w t) for each frequency w; or exp(-w t) for each rate w: [..., 1] -> [..., p]."""

    rates: tuple[float, ...]
    kind: Literal["sinusoids", "exponentials"]

    def __call__(self, times: Tensor) -> Tensor:
        angle = times * torch.tensor(self.rates, dtype=times.dtype, device=times.device)
        if self.kind == "exponentials":
            return (-angle).exp()
        return torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)


@register(
    "task",
    "waves",
    family="functions",
    cases=(
        {"length": 16, "grid": 6, "terms": 1},
        {"length": 16, "grid": 5, "noise": 0.0},
        {"length": 16, "grid": 5, "kind": "exponentials"},
    ),
)
@dataclass(frozen=True)
class WaveSeries(ForecastTask):
    """Sums of a few sinusoids, or of a few decaying exponentials, of unknown frequencies or rates: forecast them.

    Each prompt takes `terms` of the `grid` frequencies or rates, and amplitudes N(0, 1 / terms), for a sinusoid one of
    the cosine and one of the sine. Frequencies are evenly spaced in (0, pi) a step, time constants of the exponentials
    by equal ratios from 2 to 64 steps. Without noise the series obeys a linear recurrence of order 2 terms (terms for
    exponentials), so that autoregression solves it, too. The split "between the grid" has the frequencies half way
    between those of training.

    kind: "sinusoids" or "exponentials".
    terms: in each sum.
    grid: frequencies or rates to choose from.
    between: choose from those half way between instead.
    length: values in a series.
    noise: standard deviation of the noise.
    window: values that a token shows, the latest first.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"terms": 1, "grid": 8, "length": 24},
        "hard": {"grid": 24, "length": 64, "noise": 0.3},
    }

    length: PositiveInt = 32
    noise: NonNegativeFloat = 0.1
    kind: Literal["sinusoids", "exponentials"] = "sinusoids"
    terms: PositiveInt = 2
    grid: PositiveInt = 10
    between: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = math.comb(self.grid, self.terms)
        if not 1 <= choices <= MOST_MEMBERS:
            raise InputError(
                f"terms {self.terms} of a grid of {self.grid} are {choices} sets; the exact posterior weighs 1 to "
                f"{MOST_MEMBERS}, such as those of terms 2 of a grid of 10"
            )

    def rates(self) -> tuple[float, ...]:
        """Frequencies, or inverse time constants, in radians or 1 a step."""
        places = [(i + (0.5 if self.between else 0.0)) / (self.grid + 1) for i in range(1, self.grid + 1)]
        if self.kind == "sinusoids":
            return tuple(math.pi * place for place in places)
        return tuple(2.0 ** -(1 + 5 * place) for place in places)

    def members(self) -> tuple[Waves, ...]:
        """Every set of rates that a prompt may have."""
        return tuple(Waves(chosen, self.kind) for chosen in itertools.combinations(self.rates(), self.terms))

    def regressors(self, values: Tensor) -> Tensor:
        """The time of each value."""
        times = torch.arange(self.length, dtype=values.dtype, device=values.device)
        return times.unsqueeze(1).expand(len(values), -1, -1)

    def series(
        self, batch: int, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        times = torch.arange(self.length, dtype=torch.float32, device=device).unsqueeze(1)
        functions = torch.stack([member(times) for member in self.members()])  # [M, T, p]
        member = torch.randint(len(functions), (batch,), generator=generator, device=device)
        weights = torch.randn(batch, functions.shape[2], 1, generator=generator, device=device) / math.sqrt(self.terms)
        values = functions[member] @ weights
        if self.noise:
            values = values + self.noise * torch.randn(values.shape, generator=generator, device=device)
        return values, {"member": member}

    def learners(self) -> dict[str, Learner]:
        """`bayes` weighs every set of frequencies and is exact; `set_oracle` knows the set."""
        noise, order = max(self.noise, NOISELESS), (2 if self.kind == "sinusoids" else 1) * self.terms
        scale = 1 / math.sqrt(self.terms)
        members = tuple(BasisPosterior(member, noise, scale) for member in self.members())
        return {
            "bayes": BayesMixture(members),
            "all_rates": BasisPosterior(
                Waves(self.rates(), self.kind), noise, scale * math.sqrt(self.terms / self.grid)
            ),
            "autoregression": ARLeastSquares(order, max(self.noise**2, 1e-6)),
            "last_value": LastValue(),
            "set_oracle": MemberOracle(members),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every series, frequencies between the grid's, and one term."""
        found = super().splits() | {"between the grid": self.replace(between=not self.between)}
        if self.terms > 1:
            found["one term"] = self.replace(terms=1)
        return found

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero."""
        times = torch.arange(self.length, dtype=torch.float64).unsqueeze(1)
        square = Waves(self.rates(), self.kind)(times).square().sum(1).mean().item() / self.grid
        return {"squared_error": square + self.noise**2}
