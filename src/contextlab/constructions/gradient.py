"""Linear self-attention as steps of gradient descent on the examples of the prompt."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.constructions.base import (
    Construction,
    Stream,
    construction,
    put,
    reads_examples,
    require_examples,
    weight_of,
)
from contextlab.errors import InputError
from contextlab.learners import GradientDescent, Learner, PreconditionedGradientDescent
from contextlab.models import Model
from contextlab.prompt import Task


def descent_layer(dimensions: int) -> dict[str, Any]:
    """The layer that `put_descent` writes, as a ModelSpec says it."""
    options = {"heads": 1, "key_dim": dimensions, "feature_map": "identity", "normalise": False, "mean": True}
    return {"mixer": "linear_attention", "options": options}


def put_descent(mixer: Any, stream: Stream, matrix: Tensor, target: str) -> None:
    """A step of gradient descent (see `Descent`), which adds to the part `target` and changes the part "x".

    matrix: A, [d, d].
    """
    d, at = len(matrix), stream
    value = slice(2 * d, None)  # rows of in_proj: the query's, the key's, the value's
    into, out = weight_of(mixer.in_proj), weight_of(mixer.out_proj)
    put(into, slice(0, d), at["x"], d**0.5 * matrix)  # the mixer divides by the root
    put(into, slice(d, 2 * d), at["example"])
    put(into[value], at["example"], at["example"])
    put(into[value], at["y"], at["y"])
    put(out, at["x"], at["example"], -1.0)
    put(out, at[target], at["y"])


class Descent(Construction):
    """Base: w <- w + A (b - S w) from w = 0, S and b the means of x x^T and x y over the examples before.

    Token i is (x_i, x_{i-1}, y_{i-1}), the layout "paired"; the vectors of the stream are (u, x_{i-1}, y_{i-1}, p), u
    = x_i and p = 0 at first. A layer is one head of linear attention with the query A u, keys x_{j-1} and values
    (x_{j-1}, y_{j-1}): it adds b . A u to p and takes S A u from u. After k layers p = b . sum over m < k of A (I - S
    A)^m x_i, the prediction of w after k steps.

    With one layer this is 2212.07677's, Proposition 1 at W_0 = 0. There each later layer changes the targets of all
    tokens, by the weights that the whole prompt gives; in a causal model token j would be changed by those of the
    examples before j alone. Here the token that asks is changed in their place: the prediction is the same polynomial
    in S, and it is exact at every prefix.
    """

    dimensions: int
    steps: int
    looped: bool

    @abstractmethod
    def matrix(self) -> Tensor:
        """A, [d, d], symmetric, float64."""

    def stream(self) -> Stream:
        """The parts of a token's vector."""
        return Stream(x=self.dimensions, example=self.dimensions, y=1, prediction=1)

    def fields(self) -> dict[str, Any]:
        return {
            "width": self.stream().width,
            "depth": 1 if self.looped else self.steps,
            "loops": self.steps if self.looped else 1,
            "input_injection": False,
            **reads_examples(self.dimensions),
            "layers": [descent_layer(self.dimensions)],
            "read_out_bias": False,
        }

    def write(self, model: Model) -> None:
        d, at = self.dimensions, self.stream()
        put(weight_of(model.read_in), slice(0, 2 * d + 1), slice(0, 2 * d + 1))
        put(weight_of(model.read_out), slice(0, 1), at["prediction"])
        for block in model.blocks:
            put_descent(block.mixer, at, self.matrix(), "prediction")

    def check_task(self, task: Task) -> None:
        require_examples(self.name, task, self.dimensions)


@construction(
    "gd_construction",
    papers=("2212.07677", "2311.12424"),
    cases=({"dimensions": 5}, {"dimensions": 3, "steps": 4, "looped": True}),
)
@dataclass(frozen=True)
class GradientDescentConstruction(Descent):
    """Linear self-attention whose layers are steps of gradient descent on the prompt's examples (2212.07677).

    It equals the learner gradient_descent, at every prefix: steps from w = 0 on the mean of (y - w . x)^2 / 2 over the
    examples before (one layer: Proposition 1 of the paper; k layers: see `constructions.gradient.Descent`).

    It reads linear_regression's layout "paired", token i = (x_i, x_{i-1}, y_{i-1}); any number of examples.

    dimensions: d, the size of x.
    steps: of gradient descent, one a layer.
    learning_rate: of each step.
    looped: one layer that is applied `steps` times, in the place of as many equal ones (2311.12424).
    """

    dimensions: PositiveInt = 20
    steps: PositiveInt = 1
    learning_rate: PositiveFloat = 0.1
    looped: bool = False

    def matrix(self) -> Tensor:
        return self.learning_rate * torch.eye(self.dimensions, dtype=torch.float64)

    def learner(self) -> Learner:
        return GradientDescent(self.steps, self.learning_rate)


@construction(
    "preconditioned_gd_construction",
    papers=("2306.09927", "2306.00297"),
    cases=({"dimensions": 5, "examples": 16}, {"dimensions": 2, "steps": 2, "covariance": ((2.0, 0.5), (0.5, 1.0))}),
)
@dataclass(frozen=True)
class PreconditionedConstruction(Descent):
    """The linear self-attention layer that is best for Gaussian inputs of known covariance (2306.09927).

    w = A times the mean of x y over the examples before, with A^-1 = (1 + 1/N) C + (trace C + noise) / N: what training
    on prompts of N examples and w ~ N(0, I) ends with (2306.09927, Theorem 4.1, where the noise is 0). It equals the
    learner preconditioned_gd for the same N, at every prefix; with more steps, each layer is one with this A.

    It reads linear_regression's layout "paired", token i = (x_i, x_{i-1}, y_{i-1}); any number of examples.

    dimensions: d, the size of x.
    examples: N, those for which A is best.
    covariance: C of the inputs, d rows of d numbers; None for the identity.
    noise: variance of the noise on y, over the variance of the weights.
    steps: gradient steps, one a layer, all with the same A.
    looped: one layer that is applied `steps` times, in the place of as many equal ones.
    """

    dimensions: PositiveInt = 20
    examples: PositiveInt = 40
    covariance: tuple[tuple[float, ...], ...] | None = None
    noise: NonNegativeFloat = 0.0
    steps: PositiveInt = 1
    looped: bool = False

    def __post_init__(self) -> None:
        rows = self.covariance
        if rows is None:
            return
        if len(rows) != self.dimensions or any(len(row) != self.dimensions for row in rows):
            raise InputError(f"covariance: expected {self.dimensions} rows of {self.dimensions} numbers")
        matrix = torch.tensor(rows, dtype=torch.float64)
        if not torch.equal(matrix, matrix.T) or torch.linalg.eigvalsh(matrix)[0] <= 0:
            raise InputError("covariance: expected a symmetric matrix whose eigenvalues are all positive")

    def matrix(self) -> Tensor:
        c = torch.eye(self.dimensions, dtype=torch.float64)
        n, c = self.examples, c if self.covariance is None else torch.tensor(self.covariance, dtype=torch.float64)
        inverse = (1 + 1 / n) * c + (c.trace() + self.noise) / n * torch.eye(len(c), dtype=c.dtype)
        return torch.linalg.inv(inverse)

    def learner(self) -> Learner:
        c = None if self.covariance is None else torch.tensor(self.covariance, dtype=torch.float64)
        return PreconditionedGradientDescent(self.steps, c, self.noise, self.examples)
