"""Chain of thought: ReLU networks learned in context, with the features of the hidden layers shown or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.learners.chain import ChainLearner
from contextlab.learners.kernels import GaussianProcess
from contextlab.learners.regression import NearestNeighbours, Ridge
from contextlab.prompt import Learner, Prompt, Task, _numbers, wide
from contextlab.registry import register
from contextlab.tasks.base import check_options

Shown = Literal["all", "examples", "none"]


@register(
    "task",
    "chain_of_thought",
    family="functions",
    papers=("2305.18869",),
    cases=(
        {"dimensions": 4, "hidden": 3, "examples": 20},
        {"dimensions": 4, "hidden": 3, "examples": 20, "shown": "examples"},
        {"dimensions": 4, "hidden": 3, "examples": 20, "shown": "none"},
        {"dimensions": 4, "hidden": 3, "examples": 30, "layers": 2},
    ),
)
@dataclass(frozen=True)
class ChainOfThought(Task):
    """Networks s_1 = relu(W_1 x) sqrt(2 / h), ..., y = v . s_L, all weights N(0, 1), with their features (2305.18869).

    An example is the tokens x, s_1, ..., s_L, y, each in its own slots of a vector (x | s | y). With "all" shown
    each step is predicted from the one before, which is given (teacher forcing; the paper's CoT-I/O). With
    "examples" y is predicted at x, though the features come after (CoT-I). With "none" an example is x, y (ICL).
    Only predictions of y are scored; with "all" the loss counts the features' too, and the metric "step_error"
    says how well all features of the example were predicted.

    dimensions: d, the size of x.
    hidden: h, the units of each hidden layer.
    layers: L, hidden layers.
    examples: n, the examples of a network in a prompt.
    shown: "all", "examples" or "none"; see above.
    input_scale: standard deviation of each coordinate of x.
    """

    metric: ClassVar[str] = "squared_error"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 4, "hidden": 2, "examples": 30},
        "hard": {"dimensions": 20, "hidden": 8, "layers": 2, "examples": 100},
    }

    dimensions: PositiveInt = 10
    hidden: PositiveInt = 4
    layers: PositiveInt = 1
    examples: PositiveInt = 50
    shown: Shown = "all"
    input_scale: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def input_size(self) -> int:
        return self.dimensions + 1 + (0 if self.shown == "none" else self.hidden)

    @property
    def output_size(self) -> int:
        return self.hidden + 1 if self.shown == "all" else 1

    @property
    def block(self) -> int:
        """Tokens of an example."""
        return 2 if self.shown == "none" else self.layers + 2

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts of examples * (layers + 2) vectors ("none": 2), float32."""
        n, d, h = self.examples, self.dimensions, self.hidden
        xs = self.input_scale * torch.randn(batch, n, d, generator=generator, device=device)
        features: list[Tensor] = []
        for size in [d] + [h] * (self.layers - 1):
            weights = torch.randn(batch, size, h, generator=generator, device=device)
            features.append(((features[-1] if features else xs) @ weights).relu() * math.sqrt(2 / h))
        ys = features[-1] @ torch.randn(batch, h, 1, generator=generator, device=device)

        inputs = xs.new_zeros(batch, n, self.block, self.input_size)
        targets = xs.new_zeros(batch, n, self.block, self.output_size)
        inputs[:, :, 0, :d], inputs[:, :, -1, -1:] = xs, ys
        if self.shown != "none":
            inputs[:, :, 1:-1, d:-1] = torch.stack(features, 2)
        if self.shown == "all":
            targets[:, :, : self.layers, :h] = torch.stack(features, 2)
        at = self.layers if self.shown == "all" else 0  # where, in its example, y is predicted
        targets[:, :, at, -1:] = ys
        place = torch.arange(n * self.block, device=device)
        return Prompt(
            inputs.flatten(1, 2),
            targets.flatten(1, 2),
            (place % self.block == at).expand(batch, -1),
            (place // self.block).expand(batch, -1),
            # learners of y from x alone can answer where the prompt asks for y at x
            *((xs, ys, place[at :: self.block]) if self.shown != "all" else ()),
        )

    def _misses(self, prediction: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Squared errors of y, and of all features of an example together, [B, n]."""
        square = (wide(prediction) - prompt.targets).square().unflatten(1, (-1, self.block))
        if self.shown != "all":
            return square[:, :, 0, 0], torch.zeros_like(square[:, :, 0, 0])
        return square[:, :, self.layers, -1], square[:, :, : self.layers, :-1].sum((2, 3))

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean over examples of the squared error of y, and of the features where they are predicted."""
        answer, steps = self._misses(prediction, prompt)
        return (answer + steps).mean()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """squared_error [B, T] of y; with "all" shown also step_error, of the example's features together."""
        answer, steps = (miss.repeat_interleave(self.block, 1) for miss in self._misses(prediction, prompt))
        return {"squared_error": answer} | ({"step_error": steps} if self.shown == "all" else {})

    def learners(self) -> dict[str, Learner]:
        """`chain` learns the layers one by one from the features; without features, those of relu_network."""
        if self.shown == "all":
            return {"chain": self._chain()}
        noise = 1e-4 * math.sqrt(self.dimensions) * self.input_scale
        found: dict[str, Learner] = {
            "gaussian_process": GaussianProcess("arc_cosine", (1.0,), noise),
            "ridge": Ridge(self.dimensions),
            "knn": NearestNeighbours(),
        }
        return {"chain": self._chain(), **found} if self.shown == "examples" else found

    def _chain(self) -> ChainLearner:
        shown: Literal["all", "examples"] = "all" if self.shown == "all" else "examples"
        return ChainLearner(self.dimensions, self.hidden, self.layers, shown, 1e-4 * self.input_scale)

    def splits(self) -> dict[str, Task]:
        """'train', larger inputs, and more examples."""
        return {
            "train": self,
            "scaled inputs": self.replace(input_scale=2 * self.input_scale),
            "more examples": self.replace(examples=2 * self.examples),
        }

    def chance(self) -> Mapping[str, float]:
        """Of predicting zero: every layer keeps the mean square, d input_scale^2."""
        square = self.dimensions * self.input_scale**2
        return {"squared_error": square} | ({"step_error": self.layers * square} if self.shown == "all" else {})

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """One example a line: x -> features -> y."""
        lines = []
        for example in prompt.inputs[row].unflatten(0, (-1, self.block)):
            parts = [example[0, : self.dimensions], *example[1:-1, self.dimensions : -1], example[-1, -1:]]
            lines.append(" -> ".join(_numbers(part.tolist()) for part in parts))
        return "\n".join(lines)
