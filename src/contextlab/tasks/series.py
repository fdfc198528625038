"""Series of unknown length of functions of one number, and polynomials whose monomials are unknown."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError, at_most
from contextlab.learners.bayes import BasisPosterior, BayesMixture, MemberOracle
from contextlab.learners.kernels import GaussianProcess
from contextlab.learners.regression import NearestNeighbours, Ridge
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.base import Drawn, ExamplesTask
from contextlab.tasks.functions import FunctionTask
from contextlab.tasks.regression import NOISELESS


@dataclass(frozen=True)
class SeriesTask(ExamplesTask):
    """Base: y = sum over the first m terms of a series, m unknown, drawn uniformly for each prompt.

    dimensions: 1, the size of x.
    least, most: bounds of m.
    input_range: x is uniform in [-input_range, input_range].
    noise: standard deviation of the noise on y.
    """

    dimensions: PositiveInt = 1
    least: PositiveInt = 1
    most: PositiveInt = 10
    input_range: PositiveFloat = 5.0
    noise: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimensions != 1:
            raise InputError(f"dimensions {self.dimensions}: a series is a function of one number; use 1")
        if self.least > self.most:
            raise InputError(f"least {self.least} is more than most {self.most}; at most {self.most}")

    @abstractmethod
    def basis(self, terms: int) -> Callable[[Tensor], Tensor]:
        """The functions of the first `terms` terms: [..., 1] -> [..., p]; those of fewer terms come first."""

    @abstractmethod
    def scale(self, terms: int) -> float:
        """Standard deviation of the coefficients of a series of so many terms."""

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        xs = 2 * torch.rand(batch, self.examples, 1, generator=generator, device=device) - 1
        xs = self.input_range * xs
        ys, hidden = self.another(xs, generator)
        return Drawn(xs, ys, hidden=hidden)

    def another(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor] | None]:
        batch, device = len(xs), xs.device
        sizes, scales = self._sizes(device)
        member = torch.randint(len(sizes), (batch,), generator=generator, device=device)
        features = self.basis(self.most)(xs)
        weights = torch.randn(batch, features.shape[-1], generator=generator, device=device)
        used = torch.arange(features.shape[-1], device=device) < sizes[member].unsqueeze(1)
        ys = features @ (weights * used * scales[member].unsqueeze(1)).unsqueeze(-1)
        if self.noise:
            ys = ys + self.noise * torch.randn(ys.shape, generator=generator, device=device)
        return ys, {"member": member}

    def _sizes(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Functions in the basis of least, ..., most terms, and the scales of their coefficients."""
        probe = torch.zeros(1, 1, device=device)
        lengths = range(self.least, self.most + 1)
        sizes = torch.tensor([self.basis(terms)(probe).shape[-1] for terms in lengths], device=device)
        return sizes, torch.tensor([self.scale(terms) for terms in lengths], device=device)

    def square(self) -> float:
        """E f(x)^2, by a quadrature that is exact for polynomials and for a sum of cos^2 + sin^2."""
        nodes, weights = np.polynomial.legendre.leggauss(4 * self.most + 4)
        xs = torch.from_numpy(nodes).unsqueeze(-1) * self.input_range
        each = [
            self.scale(terms) ** 2 * (self.basis(terms)(xs).square().sum(-1) @ torch.from_numpy(weights)).item() / 2
            for terms in range(self.least, self.most + 1)
        ]
        return sum(each) / len(each)

    def learners(self) -> dict[str, Learner]:
        """`bayes` weighs every length of the series and is exact; `longest` assumes the longest."""
        noise = max(self.noise, NOISELESS * math.sqrt(self.square()))
        members = tuple(
            BasisPosterior(self.basis(terms), noise, self.scale(terms)) for terms in range(self.least, self.most + 1)
        )
        scales = tuple(self.input_range * factor for factor in (0.02, 0.05, 0.1, 0.25, 1.0))
        return {
            "bayes": BayesMixture(members),
            "longest": members[-1],
            "gaussian_process": GaussianProcess("rbf", scales, max(noise, 1e-3), math.sqrt(self.square())),
            "knn": NearestNeighbours(1),
            "length_oracle": MemberOracle(members),
        }

    def splits(self) -> dict[str, Task]:
        """'train', the shortest and the longest series alone, inputs beyond the range, other noise, more examples."""
        return {
            "train": self,
            "shortest": self.replace(most=self.least),
            "longest": self.replace(least=self.most),
            "wider inputs": self.replace(input_range=1.5 * self.input_range),
            "other noise": self.replace(noise=4 * self.noise if self.noise else 0.1),
            "more examples": self.replace(examples=2 * self.examples),
        }

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero."""
        return {"squared_error": self.square() + self.noise**2}


@dataclass(frozen=True)
class Fourier:
    """cos(k pi x / half_period), sin(k pi x / half_period) for k = 1, ..., frequencies: [..., 1] -> [..., 2 K]."""

    frequencies: int
    half_period: float

    def __call__(self, xs: Tensor) -> Tensor:
        k = torch.arange(1, self.frequencies + 1, device=xs.device, dtype=xs.dtype)
        angle = math.pi / self.half_period * k * xs
        return torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)


@dataclass(frozen=True)
class Legendre:
    """Legendre polynomials of degree 0, ..., degree of x / radius, of mean square 1 over [-radius, radius]."""

    degree: int
    radius: float

    def __call__(self, xs: Tensor) -> Tensor:
        x = xs.squeeze(-1) / self.radius
        found = [torch.ones_like(x), x]
        for k in range(1, self.degree):
            found.append(((2 * k + 1) * x * found[k] - k * found[k - 1]) / (k + 1))
        return torch.stack([math.sqrt(2 * k + 1) * found[k] for k in range(self.degree + 1)], -1)


@register(
    "task",
    "fourier_series",
    family="functions",
    papers=("2306.04891",),
    cases=({"examples": 20, "most": 3}, {"examples": 12, "least": 2, "most": 2, "noise": 0.2}),
)
@dataclass(frozen=True)
class FourierSeries(SeriesTask):
    """Fourier series with an unknown highest frequency K: sum of a_k cos(k pi x / L) + b_k sin(k pi x / L), over K.

    K is drawn uniformly from least, ..., most; the coefficients are N(0, 1) and the sum is divided by K; x is uniform
    ("Bayesian prism", 2306.04891). A model that has the prior's bias to simple functions answers as a short series
    does while the examples allow one.

    least: the least K.
    most: the largest K.
    half_period: L.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"most": 3, "examples": 20},
        "hard": {"most": 15, "examples": 60, "noise": 0.05},
    }

    half_period: PositiveFloat = 5.0

    def basis(self, terms: int) -> Fourier:
        return Fourier(terms, self.half_period)

    def scale(self, terms: int) -> float:
        return 1 / terms


@register(
    "task",
    "polynomial_series",
    family="functions",
    cases=({"examples": 12, "most": 3}, {"examples": 12, "least": 2, "most": 2, "noise": 0.2}),
)
@dataclass(frozen=True)
class PolynomialSeries(SeriesTask):
    """Polynomials of one number whose degree is unknown, sums of Legendre polynomials with Gaussian coefficients.

    The degree is drawn uniformly from least, ..., most. Every Legendre polynomial has mean square 1 over [-1, 1], and
    the coefficients have the variance that gives y mean square 1, whatever the degree. Beyond [-1, 1] (the split
    "wider inputs") polynomials grow fast.

    least: the least degree.
    most: the largest degree.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"most": 2, "examples": 12},
        "hard": {"most": 11, "examples": 40, "noise": 0.1},
    }

    most: PositiveInt = 5
    input_range: PositiveFloat = 1.0

    def basis(self, terms: int) -> Legendre:
        return Legendre(terms, 1.0)

    def scale(self, terms: int) -> float:
        return 1 / math.sqrt(terms + 1)


@dataclass(frozen=True)
class Monomials:
    """Products of two coordinates, x_a x_b, of given pairs (a, b): [..., d] -> [..., p]."""

    pairs: tuple[tuple[int, int], ...]

    def __call__(self, xs: Tensor) -> Tensor:
        first, second = torch.tensor(self.pairs, device=xs.device).unbind(1)
        return xs[..., first] * xs[..., second]


@register(
    "task",
    "monomial_regression",
    family="functions",
    papers=("2306.04891",),
    cases=(
        {"dimensions": 4, "terms": 2, "sets": 3, "examples": 12},
        {"dimensions": 4, "terms": 3, "sets": 2, "examples": 12, "noise": 0.3, "inputs": "skewed"},
    ),
)
@dataclass(frozen=True)
class MonomialRegression(FunctionTask):
    """Sums of degree-two monomials from one of a few fixed sets, unknown which: y = sum of w x_a x_b / sqrt(terms).

    The sets are drawn once, each prompt takes one of them and weights N(0, 1) ("Bayesian prism", 2306.04891): to
    predict well is to find the set out. The split "new sets" takes prompts from as many sets that no training
    prompt has used.

    terms: monomials in a set, of the d (d + 1) / 2 that there are.
    sets: sets that prompts are drawn from.
    held_out: draw from the sets that are held out instead.
    seed: of the sets.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "terms": 3, "sets": 4, "examples": 16},
        "hard": {"dimensions": 20, "terms": 20, "sets": 100, "examples": 60},
    }

    dimensions: PositiveInt = 10
    terms: PositiveInt = 10
    sets: PositiveInt = 20
    held_out: bool = False
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        monomials = self.dimensions * (self.dimensions + 1) // 2
        if self.terms > monomials:
            raise InputError(
                f"terms {self.terms}: {self.dimensions} dimensions have {monomials} monomials of degree two; "
                f"at most {monomials}"
            )
        # Half of all sets are asked for at most, so that drawing sets until enough differ does end soon.
        if 4 * self.sets > (most := math.comb(monomials, self.terms)):
            raise InputError(
                f"sets {self.sets}, and as many held out, of {most} sets of {self.terms} of {monomials} monomials; "
                + at_most(most // 4, "use fewer terms or more dimensions")
            )

    def pools(self) -> tuple[tuple[Monomials, ...], tuple[Monomials, ...]]:
        """The sets that training prompts are drawn from, and those held out; no set is in both."""
        found = _sets(self.dimensions, self.terms, 2 * self.sets, self.seed)
        return found[: self.sets], found[self.sets :]

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch, device = len(xs), xs.device
        pairs = torch.tensor([basis.pairs for basis in self.pools()[self.held_out]], device=device)  # [sets, terms, 2]
        member = torch.randint(self.sets, (batch,), generator=generator, device=device)
        first, second = (pairs[member, :, side].unsqueeze(1).expand(-1, xs.shape[1], -1) for side in (0, 1))
        weights = torch.randn(batch, self.terms, 1, generator=generator, device=device)
        return (xs.gather(2, first) * xs.gather(2, second)) @ weights / math.sqrt(self.terms), {"member": member}

    def square(self) -> float:
        pairs = [pair for basis in self.pools()[self.held_out] for pair in basis.pairs]
        shown = [pair for pair in pairs if max(pair) < self.active]
        return self.fourth * sum(3 if a == b else 1 for a, b in shown) / len(pairs)

    def learners(self) -> dict[str, Learner]:
        """`bayes` weighs every set and is exact; `all_monomials` knows no set; `set_oracle` knows the set."""
        noise, scale = self.assumed_noise(), 1 / math.sqrt(self.terms)
        members = tuple(BasisPosterior(basis, noise, scale) for basis in self.pools()[self.held_out])
        every = _all_pairs(self.dimensions)
        return {
            "bayes": BayesMixture(members),
            "all_monomials": BasisPosterior(Monomials(every), noise, 1 / math.sqrt(len(every))),
            "ridge": Ridge(self.dimensions),
            "knn": NearestNeighbours(),
            "set_oracle": MemberOracle(members),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every function class, and 'new sets' (or back, where the sets are held out already)."""
        return super().splits() | {"new sets": self.replace(held_out=not self.held_out)}


def _all_pairs(dimensions: int) -> tuple[tuple[int, int], ...]:
    return tuple(itertools.combinations_with_replacement(range(dimensions), 2))


@lru_cache(maxsize=32)
def _sets(dimensions: int, terms: int, count: int, seed: int) -> tuple[Monomials, ...]:
    """Different sets of monomials, drawn uniformly on the CPU."""
    generator, pairs = torch.Generator().manual_seed(seed), _all_pairs(dimensions)
    found: dict[Monomials, None] = {}
    while len(found) < count:
        chosen = torch.randperm(len(pairs), generator=generator)[:terms].sort().values.tolist()
        found[Monomials(tuple(pairs[i] for i in chosen))] = None
    return tuple(found)
