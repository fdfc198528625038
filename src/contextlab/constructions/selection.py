"""Two predictors in one model, which answers by the one that did better on the examples so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
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
from contextlab.constructions.gradient import descent_layer, put_descent
from contextlab.constructions.lookup import APART, put_head_of_place, put_places
from contextlab.constructions.softmax import put_smoothing
from contextlab.learners import ExponentialWeights, GradientDescent, KernelSmoother, Learner
from contextlab.models import Model
from contextlab.prompt import Task


@construction(
    "model_selection_construction",
    papers=("2306.04637", "2311.00871"),
    cases=({"dimensions": 3, "examples": 12}, {"dimensions": 2, "steps": 3, "temperature": 0.2, "rate": 10.0}),
)
@dataclass(frozen=True)
class ModelSelectionConstruction(Construction):
    """Attention that fits two families of functions, compares their errors and answers by the better one.

    2306.04637 shows that transformers select algorithms in context, by errors on examples held out. Here each example
    is predicted before it is read, so that none is lost: a head of softmax attention is a kernel smoother, layers of
    linear attention are steps of gradient descent on linear functions, as in kernel_smoother_construction and
    gd_construction. The token after an example looks back at what both said of it and squares the errors (squared
    ReLUs), linear attention adds them up, and a last head attends to the token itself and to the first one, whose
    scores differ by rate x (errors of the smoother - errors of the line): that softmax is the weight of the line.

    It equals the learner exponential_weights over gradient_descent and kernel_smoother, at every prefix.

    It reads examples in the layout "paired", token i = (x_i, x_{i-1}, y_{i-1}), and inputs with |x|^2 up to 2^20.

    dimensions: d, the size of x.
    examples: the most in a prompt.
    steps: of gradient descent, one a layer.
    learning_rate: of each step.
    temperature: of the smoother's kernel exp(x . x' / temperature); None for sqrt(d).
    rate: of the errors; a high one answers with the better predictor alone.
    """

    dimensions: PositiveInt = 20
    examples: PositiveInt = 40
    steps: PositiveInt = 1
    learning_rate: PositiveFloat = 0.1
    temperature: PositiveFloat | None = None
    rate: PositiveFloat = 1.0

    def stream(self) -> Stream:
        """The parts of a token's vector.

        line, smooth: what the two predict. line_before, smooth_before: what they said of the example that the token
        holds. lead: the smoother's error on it less the line's, times the rate; evidence: summed. chosen: the answer
        less `smooth`.
        """
        return Stream(
            x=self.dimensions, example=self.dimensions, y=1, line=1, smooth=1, one=1, place=1, square=1, first=1,
            line_before=1, smooth_before=1, lead=1, evidence=1, chosen=1,
        )  # fmt: skip

    def fields(self) -> dict[str, Any]:
        d, width = self.dimensions, self.stream().width
        errors = {"kind": "relu2", "options": {"ratio": 4 / width}}
        sums = {"heads": 1, "key_dim": 1, "feature_map": "identity", "normalise": False}
        layers: list[dict[str, Any]] = [
            {"mixer": "attention", "options": {"heads": 1, "head_dim": d + 2, "position": "none"}},
            *[descent_layer(d)] * self.steps,
            {"mixer": "attention", "options": {"heads": 1, "head_dim": 2, "position": "none"}, "mlp": errors},
            {"mixer": "linear_attention", "options": sums},
            {"mixer": "attention", "options": {"heads": 1, "head_dim": 3, "position": "none"}},
        ]
        return {
            "width": width,
            "depth": len(layers),
            **reads_examples(d, self.examples),
            "layers": layers,
            "read_out_bias": False,
        }

    def write(self, model: Model) -> None:
        d, at = self.dimensions, self.stream()
        put(weight_of(model.read_in), slice(0, 2 * d + 1), slice(0, 2 * d + 1))
        put_places(model, at)
        weight_of(model.positions)[0, at["first"]] = 1.0
        for part in ("smooth", "chosen"):
            put(weight_of(model.read_out), slice(0, 1), at[part])
        smoothing, *descending, looking_back, adding, choosing = model.blocks
        put_smoothing(smoothing.mixer, at, self._temperature(), "smooth")
        matrix = self.learning_rate * torch.eye(d, dtype=torch.float64)
        for block in descending:
            put_descent(block.mixer, at, matrix, "line")
        self._look_back(looking_back.mixer, looking_back.mlp)
        self._add(adding.mixer)
        self._choose(choosing.mixer)

    def _temperature(self) -> float:
        return math.sqrt(self.dimensions) if self.temperature is None else self.temperature

    def _look_back(self, mixer: Any, mlp: Any) -> None:
        """What both said of the example, from the token before (the first has none, and predicted 0); its lead."""
        at, into, out = self.stream(), weight_of(mixer.qkv_proj), weight_of(mixer.out_proj)
        put_head_of_place(into, slice(0, 2), slice(2, 4), at, 1, 2**0.5)
        for number, part in enumerate(("line", "smooth")):
            put(into, slice(4 + number, 5 + number), at[part])
            put(out, at[f"{part}_before"], slice(number, number + 1))
            for half, sign in enumerate((1.0, -1.0)):  # relu(a)^2 + relu(-a)^2 = a^2
                row = slice(2 * number + half, 2 * number + half + 1)
                put(weight_of(mlp.up), row, at[f"{part}_before"], sign)
                put(weight_of(mlp.up), row, at["y"], -sign)
                put(weight_of(mlp.out_proj), at["lead"], row, -self.rate if part == "line" else self.rate)

    def _add(self, mixer: Any) -> None:
        at, into = self.stream(), weight_of(mixer.in_proj)
        put(into, slice(0, 1), at["one"])
        put(into, slice(1, 2), at["one"])
        put(into[2:], at["lead"], at["lead"])
        put(weight_of(mixer.out_proj), at["evidence"], at["lead"])

    def _choose(self, mixer: Any) -> None:
        """Scores evidence - APART (j - i)^2 of tokens j, and 0 of the first one, whose value is 0."""
        at, into = self.stream(), weight_of(mixer.qkv_proj)
        root = 3**0.5  # the mixer divides scores by it
        put(into, slice(0, 1), at["place"], 2 * APART * root)
        put(into, slice(1, 2), at["one"], -APART * root)
        put(into, slice(2, 3), at["square"], -APART * root)
        put(into, slice(2, 3), at["evidence"], root)
        put(into, slice(3, 4), at["place"])
        put(into, slice(4, 5), at["square"])
        put(into, slice(5, 6), at["one"])
        put(into, slice(5, 6), at["first"], -1.0)
        put(into, slice(6, 7), at["line"])
        put(into, slice(6, 7), at["smooth"], -1.0)
        put(weight_of(mixer.out_proj), at["chosen"], slice(0, 1))

    def learner(self) -> Learner:
        members = GradientDescent(self.steps, self.learning_rate), KernelSmoother(self._temperature())
        return ExponentialWeights(members, self.rate)

    def check_task(self, task: Task) -> None:
        require_examples(self.name, task, self.dimensions, self.examples)
