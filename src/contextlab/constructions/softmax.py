"""Softmax attention as a mean of the examples' outputs, weighed by a kernel, and as the nearest one's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from contextlab.constructions.base import (
    Construction,
    Stream,
    construction,
    put,
    reads_examples,
    require_examples,
    weight_of,
)
from contextlab.learners import GaussianSmoother, KernelSmoother, Learner, NearestNeighbours
from contextlab.models import Model
from contextlab.prompt import Task

REACH = 2.0**20
"""Above all |x|^2 and |x . x'|: by so much, over the temperature, the token without an example is below all others."""

SHARP = 2.0**-30
"""Of the nearest neighbour: its weight is 1 up to e^-40 where the next one's distance squared is 1e-7 larger."""


def put_smoothing(mixer: Any, stream: Stream, divisor: float, target: str, gaussian: bool = False) -> None:
    """A head that adds the mean of the examples' y, weighed as `Smoother` says, to the part `target`.

    mixer: attention of one head of size d + 2. divisor: the temperature. gaussian: whether the keys' lengths count.
    """
    at, d = stream, stream["x"].stop - stream["x"].start
    size = d + 2
    into, root = weight_of(mixer.qkv_proj), size**0.5  # the mixer divides scores by the root
    put(into, slice(0, d), at["x"], root / divisor)
    put(into, slice(size, size + d), at["example"])
    put(into, slice(d, d + 1), at["one"], root / divisor)
    put(into, slice(size + d, size + d + 1), at["first"], -REACH)
    if gaussian:
        put(into, slice(size + d, size + d + 1), at["square"], -0.5)
    put(into, slice(2 * size, 2 * size + 1), at["y"])
    put(weight_of(mixer.out_proj), at[target], slice(0, 1))


class Smoother(Construction):
    """Base: one head of softmax attention whose query is x_i and whose keys and values are the examples' x and y.

    Token i is (x_i, x_{i-1}, y_{i-1}), the layout "paired"; the stream is (x_i, x_{i-1}, y_{i-1}, p) and three numbers:
    one, whether it is the first token (from learned positions), and |x_{i-1}|^2. The first token has no example; its
    key stands REACH / temperature below the others. Scores are x . x' / temperature, of the Gaussian kernel less |x'|^2
    / (2 temperature), which the squared ReLUs of an MLP without a mixer make: |x|^2 is the same for all keys.
    """

    dimensions: int
    examples: int

    @property
    def gaussian(self) -> bool:
        """Whether the keys' lengths count."""
        return True

    @property
    def divisor(self) -> float:
        """The temperature."""
        return SHARP

    def stream(self) -> Stream:
        """The parts of a token's vector."""
        return Stream(x=self.dimensions, example=self.dimensions, y=1, prediction=1, one=1, first=1, square=1)

    def fields(self) -> dict[str, Any]:
        d, width = self.dimensions, self.stream().width
        attention = {"mixer": "attention", "options": {"heads": 1, "head_dim": d + 2, "position": "none"}}
        squares = {"mixer": "none", "mlp": {"kind": "relu2", "options": {"ratio": 2 * d / width}}}
        return {
            "width": width,
            "depth": 1 + self.gaussian,
            **reads_examples(d, self.examples),
            "layers": [squares, attention] if self.gaussian else [attention],
            "read_out_bias": False,
        }

    def write(self, model: Model) -> None:
        d, at = self.dimensions, self.stream()
        put(weight_of(model.read_in), slice(0, 2 * d + 1), slice(0, 2 * d + 1))
        places = weight_of(model.positions)
        places[:, at["one"]] = 1.0
        places[0, at["first"]] = 1.0
        put(weight_of(model.read_out), slice(0, 1), at["prediction"])
        *squares, attention = model.blocks
        for block in squares:
            mlp: Any = block.mlp  # relu(a)^2 + relu(-a)^2 = a^2
            put(weight_of(mlp.up), slice(0, d), at["example"])
            put(weight_of(mlp.up), slice(d, 2 * d), at["example"], -1.0)
            weight_of(mlp.out_proj)[at["square"], :] = 1.0
        put_smoothing(attention.mixer, at, self.divisor, "prediction", self.gaussian)

    def check_task(self, task: Task) -> None:
        require_examples(self.name, task, self.dimensions, self.examples)


@construction(
    "kernel_smoother_construction",
    papers=("2305.12766",),
    cases=({"dimensions": 5, "examples": 16}, {"dimensions": 3, "kernel": "gaussian", "temperature": 0.5}),
)
@dataclass(frozen=True)
class KernelSmootherConstruction(Smoother):
    """One layer of softmax attention as a step of kernel regression (Nadaraya-Watson) over the prompt's examples.

    The prediction is the mean of the examples' y, weighed by the kernel of their x and the query (2305.12766, which
    reads in-context learning so). With the kernel "softmax" it equals the learner kernel_smoother, with "gaussian"
    gaussian_smoother, at every prefix.

    It reads examples in the layout "paired", token i = (x_i, x_{i-1}, y_{i-1}), and inputs with |x|^2 up to 2^20.

    dimensions: d, the size of x.
    examples: the most in a prompt.
    kernel: "softmax" exp(x . x' / temperature), or "gaussian" exp(-|x - x'|^2 / (2 temperature)), whose squares take an
        MLP before the layer.
    temperature: of the kernel; None for sqrt(d), the attention's usual scale.
    """

    dimensions: PositiveInt = 20
    examples: PositiveInt = 40
    kernel: Literal["softmax", "gaussian"] = "softmax"
    temperature: PositiveFloat | None = None

    @property
    def gaussian(self) -> bool:
        return self.kernel == "gaussian"

    @property
    def divisor(self) -> float:
        return math.sqrt(self.dimensions) if self.temperature is None else self.temperature

    def learner(self) -> Learner:
        return GaussianSmoother(self.divisor) if self.gaussian else KernelSmoother(self.divisor)


@construction("nearest_neighbour_construction", papers=("2411.10830",), cases=({"dimensions": 5, "examples": 16},))
@dataclass(frozen=True)
class NearestNeighbourConstruction(Smoother):
    """One layer of softmax attention, so sharp that it answers with the output of the nearest example (2411.10830).

    It equals the learner knn with one neighbour, at every prefix; where two distances squared differ by less than 1e-7
    it answers with a mean of both. An MLP before the layer makes |x|^2 of each example.

    It reads examples in the layout "paired", token i = (x_i, x_{i-1}, y_{i-1}), and inputs with |x|^2 up to 2^20.

    dimensions: d, the size of x.
    examples: the most in a prompt.
    """

    dimensions: PositiveInt = 20
    examples: PositiveInt = 40

    def learner(self) -> Learner:
        return NearestNeighbours(1)
