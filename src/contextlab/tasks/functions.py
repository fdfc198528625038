"""Real functions of Gaussian inputs, one for each prompt: quadratics, Hermite polynomials, decision trees."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.bayes import BasisPosterior
from contextlab.learners.kernels import GaussianProcess, KernelSmoother
from contextlab.learners.regression import LeastSquares, NearestNeighbours, Ridge
from contextlab.learners.single_index import SingleIndexFits, SingleIndexProcess, radius
from contextlab.learners.trees import BoostedTrees, DecisionTree
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.base import Drawn, ExamplesTask
from contextlab.tasks.regression import NOISELESS, LinearRegression

Inputs = Literal["gaussian", "skewed", "clustered"]

MOST_DEGREE = 8
"""Of Hermite polynomials."""


@dataclass(frozen=True)
class InputsTask(ExamplesTask):
    """Base: examples whose x is Gaussian, and isotropic on average over prompts.

    input_scale: root of the mean square of each coordinate of x.
    inputs: "gaussian" (isotropic); "skewed" as in linear_regression (the i-th eigenvalue of the covariance
        proportional to 1 / i^2, a random eigenbasis for each prompt); "clustered" around `clusters` centres, drawn
        for each prompt, which have 90% of the variance.
    clusters: centres in a prompt.
    active_dimensions: x is zero beyond so many dimensions, a curriculum's option; None for all.
    """

    input_scale: PositiveFloat = 1.0
    inputs: Inputs = "gaussian"
    clusters: PositiveInt = 4
    active_dimensions: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.dimensions:
            raise InputError(
                f"active_dimensions {self.active} is more than dimensions {self.dimensions}; at most {self.dimensions}"
            )

    @property
    def active(self) -> int:
        """Dimensions in which x is not zero."""
        return self.dimensions if self.active_dimensions is None else self.active_dimensions

    def draw_xs(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """[batch, examples, d]."""
        return self._linear()._draw_xs(batch, generator, device)

    def _linear(self) -> LinearRegression:
        """The linear task with these inputs."""
        return LinearRegression(
            dimensions=self.dimensions,
            examples=self.examples,
            input_scale=self.input_scale,
            spectrum="skewed" if self.inputs == "skewed" else "isotropic",
            inputs="clustered" if self.inputs == "clustered" else "gaussian",
            clusters=self.clusters,
            active_dimensions=self.active_dimensions,
        )

    @property
    def fourth(self) -> float:
        """E x_a^2 x_b^2 for active a != b, a third of E x_a^4: among the active, x has no preferred direction."""
        d = self.active
        values = self._linear().eigenvalues().double()  # of ones, where the inputs are clustered: each x is Gaussian
        radius = 2 * values.square().sum() + values.sum().square()  # E |x|^4
        return self.input_scale**4 * radius.item() / (d * (d + 2))

    def splits(self) -> dict[str, Task]:
        """'train', then shifts of the inputs and of the length, one at a time."""
        found: dict[str, Task] = {"train": self, "scaled inputs": self.replace(input_scale=2 * self.input_scale)}
        for inputs in ("gaussian", "skewed", "clustered"):
            if inputs != self.inputs:
                found[f"{inputs} inputs"] = self.replace(inputs=inputs)
        found["more examples"] = self.replace(examples=2 * self.examples)
        return found


@dataclass(frozen=True)
class FunctionTask(InputsTask):
    """Base: y = f(x) + noise, a new f for each prompt. Subclasses define `functions`, `square` and `learners`.

    noise: standard deviation of the noise on y.
    """

    noise: NonNegativeFloat = 0.0

    @abstractmethod
    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a function for each prompt: its values [B, n, k] at xs [B, n, d], and what defines it."""

    @abstractmethod
    def square(self) -> float:
        """E |f(x)|^2."""

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        xs = self.draw_xs(batch, generator, device)
        ys, hidden = self.functions(xs, generator)
        if self.noise:
            ys = ys + self.noise * torch.randn(ys.shape, generator=generator, device=device)
        return Drawn(xs, ys, hidden=hidden)

    def another(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor] | None]:
        ys, hidden = self.functions(xs, generator)
        return ys + self.noise * torch.randn(ys.shape, generator=generator, device=xs.device), hidden

    def assumed_noise(self) -> float:
        """The noise that Bayesian learners assume: above rounding where there is none."""
        return max(self.noise, NOISELESS * math.sqrt(self.square()))

    def splits(self) -> dict[str, Task]:
        """'train', then shifts of the inputs, of the length and of the noise, one at a time."""
        return super().splits() | {"other noise": self.replace(noise=4 * self.noise if self.noise else 0.5)}

    def chance(self) -> Mapping[str, float]:
        """The expected squared error of predicting zero."""
        return {"squared_error": self.square() + self.noise**2 * self.output_size}


def squares(xs: Tensor) -> Tensor:
    """xs [..., d] -> x_a^2 / sqrt(3) for every a, [..., d]: of variance x_a^2 for Gaussian x."""
    return xs.square() / math.sqrt(3)


@register(
    "task",
    "quadratic_regression",
    family="functions",
    papers=("2208.01066",),
    cases=({"dimensions": 5, "examples": 16}, {"dimensions": 4, "examples": 12, "noise": 0.5, "inputs": "skewed"}),
)
@dataclass(frozen=True)
class QuadraticRegression(FunctionTask):
    """Quadratics without cross terms: y = sum of w_a x_a^2 / sqrt(3), w ~ N(0, I) (Garg et al., 2208.01066).

    Linear regression on squares: the exact Bayes predictor is ridge regression there. The factor makes y as large
    as a linear function's.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "examples": 16},
        "hard": {"noise": 1.0, "inputs": "skewed"},
    }

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.randn(len(xs), self.dimensions, 1, generator=generator, device=xs.device)
        return squares(xs) @ weights, {"weights": weights}

    def square(self) -> float:
        return self.active * self.fourth

    def learners(self) -> dict[str, Learner]:
        """`bayes` on the squares is exact; the others do not know them."""
        return {
            "bayes": BasisPosterior(squares, self.assumed_noise()),
            "polynomial": GaussianProcess(
                "polynomial", (math.sqrt(self.dimensions),), self.assumed_noise(), math.sqrt(self.square() / 4)
            ),
            "ridge": Ridge(self.dimensions),
            "knn": NearestNeighbours(),
        }


@register(
    "task",
    "hermite_regression",
    family="functions",
    papers=("2404.03558",),
    cases=({"dimensions": 4, "examples": 16}, {"dimensions": 3, "examples": 12, "degree": 3, "noise": 0.3}),
)
@dataclass(frozen=True)
class HermiteRegression(FunctionTask):
    """Polynomials of one direction: y = sum of He_k(w . x) / sqrt(k! degree), k = 1 .. degree (2404.03558).

    w is uniform on the unit sphere, so that w . x is N(0, 1) where x is, the normalised Hermite polynomials are
    orthonormal and E y^2 = 1 for every degree: classes of growing difficulty and the same size, for curricula over
    several of them. Degree 1 is linear, 2 quadratic, 3 cubic. From degree 2 on the posterior has no closed form.

    degree: of the polynomial.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 3, "examples": 20},
        "hard": {"examples": 100, "degree": 3},
    }

    dimensions: PositiveInt = 10
    degree: PositiveInt = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree > MOST_DEGREE:
            raise InputError(
                f"degree {self.degree}: above {MOST_DEGREE} rounding spoils the moments; use at most {MOST_DEGREE}"
            )

    def coefficients(self) -> tuple[float, ...]:
        """Of the polynomial, the constant first."""
        total = torch.zeros(self.degree + 1, dtype=torch.float64)
        last, this = torch.zeros_like(total), torch.zeros_like(total)
        this[0] = 1.0
        for k in range(1, self.degree + 1):  # He_k = t He_{k-1} - (k - 1) He_{k-2}
            last, this = this, this.roll(1) - (k - 1) * last
            total += this / math.sqrt(math.factorial(k) * self.degree)
        return tuple(total.tolist())

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.randn(len(xs), self.dimensions, 1, generator=generator, device=xs.device)
        weights = weights / weights.norm(dim=1, keepdim=True)
        along = xs @ weights
        values = torch.zeros_like(along)
        for coefficient in reversed(self.coefficients()):
            values = values * along + coefficient
        return values, {"weights": weights}

    def square(self) -> float:
        found = self.coefficients()
        moments = self._moments(2 * self.degree)
        return sum(a * b * moments[j + k] for j, a in enumerate(found) for k, b in enumerate(found))

    def _moments(self, most: int) -> list[float]:
        """E (w . x)^n, n = 0 .. most, from the cumulants of |x|^2 (x has no preferred direction)."""
        values = self._linear().eigenvalues().double() * self.input_scale**2
        cumulants = [2 ** (n - 1) * math.factorial(n - 1) * values.pow(n).sum().item() for n in range(1, most // 2 + 1)]
        squares = [1.0]  # E |x|^(2 n)
        for n in range(1, most // 2 + 1):
            squares.append(sum(math.comb(n - 1, i) * cumulants[i] * squares[n - 1 - i] for i in range(n)))
        # w . x is |x| times one coordinate of a point of the sphere, whose moments are a normal's over the radius's.
        pairs = [math.prod(range(1, 2 * n, 2)) / radius(self.dimensions, 2 * n) for n in range(most // 2 + 1)]
        return [pairs[n // 2] * squares[n // 2] if n % 2 == 0 else 0.0 for n in range(most + 1)]

    def learners(self) -> dict[str, Learner]:
        """`single_index_fits` searches for the direction, near the exact posterior; `single_index_process` is the best
        affine in the outputs, and the first for lines. The others do not know the polynomial."""
        noise, found = self.assumed_noise(), self.coefficients()
        best: dict[str, Learner] = {
            "single_index_fits": SingleIndexFits(found, noise, every=max(1, self.examples // 20)),
            "single_index_process": SingleIndexProcess(found, noise),
        }
        if self.degree == 1:
            best = dict(reversed(best.items()))
        return {
            **best,
            "ridge": Ridge(self.dimensions),
            "ols": LeastSquares(),
            "knn": NearestNeighbours(),
            "kernel_smoother": KernelSmoother(),
        }


@register(
    "task",
    "decision_tree",
    family="functions",
    papers=("2208.01066",),
    cases=({"dimensions": 5, "examples": 40, "depth": 2}, {"dimensions": 4, "examples": 30, "depth": 3, "noise": 0.3}),
)
@dataclass(frozen=True)
class DecisionTrees(FunctionTask):
    """Random decision trees: each inner node asks for the sign of one coordinate, each leaf has a value N(0, 1).

    The coordinates are drawn uniformly and with repetition, as in 2208.01066; all inputs that reach a leaf get its
    value. `gaussian_process` has the trees' covariance (two inputs share a leaf with probability a^depth, a the
    fraction of coordinates whose signs agree): nothing linear in the outputs is better.

    depth: questions between the root and a leaf.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "examples": 60, "depth": 2},
        "hard": {"dimensions": 20, "examples": 100, "depth": 4},
    }

    examples: PositiveInt = 100
    depth: PositiveInt = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth > 12:
            raise InputError(f"depth {self.depth} has 2^{self.depth} leaves; use a depth of at most 12")

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # Nodes in the order of a heap: the children of node i are 2 i + 1 and 2 i + 2.
        batch, inner = len(xs), 2**self.depth - 1
        asks = torch.randint(self.dimensions, (batch, inner), generator=generator, device=xs.device)
        leaves = torch.randn(batch, inner + 1, generator=generator, device=xs.device)
        node = torch.zeros(xs.shape[:2], dtype=torch.int64, device=xs.device)
        for _ in range(self.depth):
            asked = xs.gather(2, asks.gather(1, node).unsqueeze(-1)).squeeze(-1)
            node = 2 * node + 1 + (asked > 0)
        return leaves.gather(1, node - inner).unsqueeze(-1), {"asks": asks, "leaves": leaves}

    def square(self) -> float:
        return 1.0

    def learners(self) -> dict[str, Learner]:
        """`gaussian_process` first: the best linear in the outputs. The trees are fitted to some prefixes only."""
        every = max(1, self.examples // 4)
        return {
            "gaussian_process": GaussianProcess("agreement", (1.0,), self.assumed_noise(), degree=self.depth),
            "boosted_trees": BoostedTrees(every=every, signs=True),
            "tree": DecisionTree(every=every, signs=True),
            "ridge": Ridge(self.dimensions),
            "knn": NearestNeighbours(),
        }
