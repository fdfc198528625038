"""Linear attention that reads both ways as GD++ and as Newton's iteration: the examples themselves change."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

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
from contextlab.learners import GradientDescentPlusPlus, Learner, Newton
from contextlab.models import Model
from contextlab.prompt import Task


class Both(Construction):
    """Base: layers of linear attention with two heads, one that the query asks and one that the examples ask.

    A token is (x_i, x_{i-1}, y_{i-1}), the layout "paired"; the last one, whose x is the query, answers (pool "last").
    In such layers the examples are changed by what the whole prompt says, so that a prompt is read as a whole; the
    prediction at a prefix is that for the prompt cut there. Tasks that score one example a prompt fit: query "random"
    of linear_regression.
    """

    dimensions: int

    @abstractmethod
    def stream(self) -> Stream:
        """The parts of a token's vector."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Layers."""

    def fields(self) -> dict[str, Any]:
        options = {
            "heads": 2, "key_dim": self.dimensions, "feature_map": "identity", "normalise": False, "mean": True,
        }  # fmt: skip
        return {
            "width": self.stream().width,
            "depth": self.depth,
            **reads_examples(self.dimensions),
            "layers": [{"mixer": "encoder_linear_attention", "options": options}],
            "pool": "last",
        }

    def ends(self, model: Model) -> None:
        """The read-in of x, example and y, and the read-out of prediction."""
        d, at = self.dimensions, self.stream()
        given = weight_of(model.read_in)
        put(given, at["x"], slice(0, d))
        put(given, at["example"], slice(d, 2 * d))
        put(given, at["y"], slice(2 * d, 2 * d + 1))
        head: Any = model.read_out
        put(weight_of(head.read_out), slice(0, 1), at["prediction"])

    def head(self, mixer: Any, number: int, query: str, key: str, value: tuple[str, ...]) -> None:
        """Head `number` asks by the part `query`, is asked by `key`, and gives the parts of `value`, in this order."""
        d, at, into = self.dimensions, self.stream(), weight_of(mixer.in_proj)
        put(into, slice(number * d, (number + 1) * d), at[query], d**0.5)  # the mixer divides by the root
        put(into, slice((2 + number) * d, (3 + number) * d), at[key])
        row = 4 * d + number * mixer.width // 2
        for part in value:
            size = at[part].stop - at[part].start
            put(into, slice(row, row + size), at[part])
            row += size

    def add(self, mixer: Any, number: int, first: int, part: str, factor: float) -> None:
        """Add factor times the values of head `number`, from the `first` on, to `part`."""
        to = self.stream()[part]
        start = number * mixer.width // 2 + first
        put(weight_of(mixer.out_proj), to, slice(start, start + to.stop - to.start), factor)

    def check_task(self, task: Task) -> None:
        require_examples(self.name, task, self.dimensions)
        if not task.one_prediction:
            raise InputError(
                f"{self.name} answers once a prompt, the task scores every example; set linear_regression's query to "
                "'random'"
            )


@construction("gd_plus_plus_construction", papers=("2212.07677",), cases=({"dimensions": 3, "steps": 3},))
@dataclass(frozen=True)
class GradientDescentPlusPlusConstruction(Both):
    """Linear self-attention that reads both ways, whose layers are steps of GD++ (2212.07677, section 3).

    A layer is a step of gradient descent that changes the targets, y <- y - dW x, and beside it changes the inputs,
    x <- (I - curvature X X^T / n) x, so that the next step sees a better conditioned problem; for the examples and for
    the query alike. It equals the learner gd_plus_plus.

    It answers for the last token of a prompt of the layout "paired", (x_i, x_{i-1}, y_{i-1}); a prefix is a shorter
    prompt, as linear_regression scores them with query "random". A causal model cannot be it with a layer a step: the
    examples would be changed by those before them alone.

    dimensions: d, the size of x.
    steps: of GD++, one a layer.
    learning_rate: of each step.
    curvature: gamma of the change of the inputs; with 0 it is gradient descent.
    """

    dimensions: PositiveInt = 20
    steps: PositiveInt = 2
    learning_rate: PositiveFloat = 0.1
    curvature: NonNegativeFloat = 0.05

    @property
    def depth(self) -> int:
        return self.steps

    def stream(self) -> Stream:
        return Stream(x=self.dimensions, example=self.dimensions, y=1, prediction=1)

    def write(self, model: Model) -> None:
        self.ends(model)
        for block in model.blocks:
            mixer: Any = block.mixer
            for number, (query, target, sign) in enumerate((("x", "prediction", 1.0), ("example", "y", -1.0))):
                self.head(mixer, number, query, "example", ("example", "y"))
                self.add(mixer, number, 0, query, -self.curvature)
                self.add(mixer, number, self.dimensions, target, sign * self.learning_rate)

    def learner(self) -> Learner:
        return GradientDescentPlusPlus(self.steps, self.learning_rate, self.curvature)


@construction("newton_construction", papers=("2310.17086", "2403.03183"), cases=({"dimensions": 3, "steps": 3},))
@dataclass(frozen=True)
class NewtonConstruction(Both):
    """Linear self-attention that reads both ways, whose layers are steps of Newton's iteration (2310.17086).

    M_0 = start S and M <- 2 M - M S M, for S the mean of x x^T over the examples: the first layer writes M_0 x beside
    each x, the example's and the query's; each further one takes the step, as M S M x is the mean of M x_j (x_j . M x);
    the last reads the mean of y_j (x_j . M x) for the query's. It equals the learner newton with the same `start`.
    k steps take k + 2 layers, as 2310.17086's theorem has it up to a constant. What is written is M x / 2^k after k
    steps, so that a layer need not double what it finds.

    It answers for the last token of a prompt of the layout "paired", (x_i, x_{i-1}, y_{i-1}); a prefix is a shorter
    prompt, as linear_regression scores them with query "random".

    dimensions: d, the size of x.
    steps: of Newton's iteration.
    start: of M_0; the iteration converges where it is below 2 / (largest eigenvalue of S)^2.
    """

    dimensions: PositiveInt = 20
    steps: NonNegativeInt = 4
    start: PositiveFloat = 0.01

    def __post_init__(self) -> None:
        if self.steps > 60:
            raise InputError(f"steps {self.steps}: the weights are powers of two up to 2^steps; use at most 60")

    @property
    def depth(self) -> int:
        return self.steps + 2

    def stream(self) -> Stream:
        d = self.dimensions
        return Stream(x=d, example=d, inverse_x=d, inverse_example=d, y=1, prediction=1)

    def write(self, model: Model) -> None:
        self.ends(model)
        first, *steps, last = (block.mixer for block in model.blocks)
        for number, part in enumerate(("x", "example")):
            self.head(first, number, part, "example", ("example",))
            self.add(first, number, 0, f"inverse_{part}", self.start)
            for k, mixer in enumerate(steps):
                self.head(mixer, number, f"inverse_{part}", "example", ("inverse_example",))
                self.add(mixer, number, 0, f"inverse_{part}", -(2.0 ** (k - 1)))
        self.head(last, 0, "inverse_x", "example", ("y",))
        self.add(last, 0, 0, "prediction", 2.0**self.steps)

    def learner(self) -> Learner:
        return Newton(self.steps, self.start)
