"""Regression on networks: one of random weights, and a linear one on the features of a fixed network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.learners.bayes import BasisPosterior
from contextlab.learners.kernels import GaussianProcess, KernelSmoother
from contextlab.learners.networks import TwoLayerNetwork
from contextlab.learners.regression import LeastSquares, NearestNeighbours, Ridge
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.functions import FunctionTask


@register(
    "task",
    "relu_network",
    family="functions",
    papers=("2208.01066",),
    cases=({"dimensions": 5, "examples": 16}, {"dimensions": 4, "examples": 10, "hidden": 3, "noise": 0.5}),
)
@dataclass(frozen=True)
class ReluNetwork(FunctionTask):
    """Two-layer ReLU networks: y = sqrt(2 / h) sum of v_j relu(w_j . x), all weights N(0, 1) (2208.01066).

    The predictor with the least error is not known in closed form. `gaussian_process` has the networks' covariance:
    nothing linear in the outputs is better, and for many hidden units nothing at all.

    hidden: h, the hidden units.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "examples": 30, "hidden": 4},
        "hard": {"examples": 100, "hidden": 100},
    }

    hidden: PositiveInt = 100

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        first = torch.randn(len(xs), self.dimensions, self.hidden, generator=generator, device=xs.device)
        second = torch.randn(len(xs), self.hidden, 1, generator=generator, device=xs.device)
        ys = (xs @ first).relu() @ second * math.sqrt(2 / self.hidden)
        return ys, {"first": first, "second": second}

    def square(self) -> float:
        return self.active * self.input_scale**2

    def learners(self) -> dict[str, Learner]:
        """`gaussian_process` first: the best linear in the outputs, as `ridge` is with weights on the inputs alone.

        `network`, trained on each prompt, is by far the slowest.
        """
        noise = self.assumed_noise()
        return {
            "gaussian_process": GaussianProcess("arc_cosine", (1.0,), noise),
            "ridge": Ridge(self.active + 2 * noise**2),
            "ols": LeastSquares(),
            "network": TwoLayerNetwork(min(self.hidden, 100), every=max(1, self.examples // 4)),
            "knn": NearestNeighbours(),
            "kernel_smoother": KernelSmoother(),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every function class, and 'linear functions' on the same inputs, as in the code of 2208.01066."""
        return super().splits() | {"linear functions": self._linear().replace(layout=self.layout, noise=self.noise)}


@dataclass(frozen=True)
class Representation:
    """phi: a fixed MLP of `layers` layers, [..., d] -> [..., width]; leaky ReLU of slope 0.01 after each.

    Each weight matrix is random with orthonormal columns (rows, where it widens), drawn on the CPU from the seed.
    """

    dimensions: int
    width: int
    layers: int
    seed: int

    def __call__(self, xs: Tensor) -> Tensor:
        for weight in _weights(self):
            xs = F.leaky_relu(xs @ weight.to(xs), 0.01)
        return xs


@lru_cache(maxsize=32)
def _weights(representation: Representation) -> list[Tensor]:
    generator = torch.Generator().manual_seed(representation.seed)
    sizes = [representation.dimensions] + [representation.width] * representation.layers
    return [
        torch.nn.init.orthogonal_(torch.empty(a, b), gain=math.sqrt(2), generator=generator)
        for a, b in itertools.pairwise(sizes)
    ]


@lru_cache(maxsize=64)
def _mean_square(task: RepresentationRegression) -> float:
    generator = torch.Generator().manual_seed(task.seed)
    draws = max(1, 100_000 // task.examples)
    return task.basis()(task.draw_xs(draws, generator, "cpu")).square().sum(-1).mean().item()


@register(
    "task",
    "representation_regression",
    family="functions",
    papers=("2310.10616",),
    cases=({"dimensions": 5, "examples": 16, "width": 6}, {"dimensions": 4, "examples": 12, "width": 4, "layers": 1}),
)
@dataclass(frozen=True)
class RepresentationRegression(FunctionTask):
    """Linear functions of one fixed representation: y = phi(x) . w + noise, w ~ N(0, I) for each prompt (2310.10616).

    phi is a random MLP that never changes: a model can learn it in its weights, and only w in context. The sizes
    and the scale of phi are ours (each layer keeps the size of its input, about).

    width: size of phi(x).
    layers: of phi.
    seed: of phi.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 5, "width": 5, "layers": 1, "examples": 16},
        "hard": {"width": 40, "layers": 4, "examples": 80, "noise": 0.5},
    }

    noise: NonNegativeFloat = 0.1
    width: PositiveInt = 20
    layers: PositiveInt = 3
    seed: NonNegativeInt = 0

    def basis(self) -> Representation:
        """phi."""
        return Representation(self.dimensions, self.width, self.layers, self.seed)

    def functions(self, xs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.randn(len(xs), self.width, 1, generator=generator, device=xs.device)
        return self.basis()(xs) @ weights, {"weights": weights}

    def square(self) -> float:
        """E |phi(x)|^2, estimated once from 100,000 inputs of a fixed seed: it has no closed form."""
        return _mean_square(self)

    def learners(self) -> dict[str, Learner]:
        """`bayes` knows phi and is exact; the others do not know it."""
        return {
            "bayes": BasisPosterior(self.basis(), self.assumed_noise()),
            "gaussian_process": GaussianProcess("arc_cosine", (1.0,), self.assumed_noise()),
            "ridge": Ridge(self.dimensions),
            "ols": LeastSquares(),
            "knn": NearestNeighbours(),
        }

    def splits(self) -> dict[str, Task]:
        """Those of every function class, and 'other representation', which in-context learning alone must solve."""
        return super().splits() | {"other representation": self.replace(seed=self.seed + 1)}
