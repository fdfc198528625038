"""Classification in context: labels from a logistic or softmax model, new weights for each prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.learners.classification import LogisticRegression, SoftmaxRegression
from contextlab.learners.kernels import KernelSmoother
from contextlab.learners.regression import Averaging, NearestNeighbours, Ridge
from contextlab.prompt import Learner, Prompt, Task, _numbers, wide
from contextlab.registry import register
from contextlab.tasks.base import Drawn, LabelTask, corrupt_examples, rotated
from contextlab.tasks.functions import InputsTask

Labels = Literal["drawn", "likeliest"]


@register(
    "task",
    "logistic_regression",
    family="functions",
    papers=("2208.01066",),
    cases=({"dimensions": 4, "examples": 20}, {"dimensions": 4, "examples": 16, "labels": "likeliest"}),
)
@dataclass(frozen=True)
class LogisticClassification(InputsTask, LabelTask):
    """Labels -1 and +1 from a logistic model: P(y = +1) = sigmoid(w . x), w ~ N(0, weight_scale^2 I).

    With labels "likeliest" y is the sign of w . x: the linear classification of 2208.01066's code.

    weight_scale: standard deviation of each weight; the larger, the surer the labels.
    labels: "drawn" from their probabilities, or the "likeliest".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 3, "examples": 30, "labels": "likeliest"},
        "hard": {"dimensions": 20, "examples": 80, "weight_scale": 0.5, "inputs": "skewed"},
    }

    dimensions: PositiveInt = 10
    weight_scale: PositiveFloat = 1.0
    labels: Labels = "drawn"

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        xs = self.draw_xs(batch, generator, device)
        weights = self.weight_scale * torch.randn(batch, self.dimensions, 1, generator=generator, device=device)
        logits = xs @ weights
        bar = torch.full_like(logits, 0.5)
        if self.labels == "drawn":
            bar = torch.rand(logits.shape, generator=generator, device=device)
        return Drawn(xs, torch.where(logits.sigmoid() > bar, 1.0, -1.0), hidden={"weights": weights})

    def learners(self) -> dict[str, Learner]:
        """`logistic` first: the weights' scale is known, and drawn labels get the logit averaged over w, about.

        The exact logit has no closed form. Where labels are the likeliest, nothing tells the length of w: a small
        strength lets the logits grow with the margin that the examples leave. The averaged logits say the same label,
        at a loss that is less where the examples are few for the dimensions, and greater where they are many.
        """
        drawn = self.labels == "drawn"
        strength = (self.weight_scale if drawn else max(self.weight_scale, 10 / self.input_scale)) ** -2
        return {
            "logistic": LogisticRegression(strength, averaged=drawn),
            "logistic_map" if drawn else "logistic_averaged": LogisticRegression(strength, averaged=not drawn),
            "ridge": Ridge(self.dimensions * self.input_scale**2),
            "averaging": Averaging(),
            "kernel_smoother": KernelSmoother(),
            "knn": NearestNeighbours(),
        }

    def splits(self) -> dict[str, Task]:
        """Shifts of the inputs and of the length, and 'surer labels'."""
        return super().splits() | {"surer labels": self.replace(weight_scale=4 * self.weight_scale)}


@dataclass(frozen=True)
class ClassTask(InputsTask):
    """Base: examples whose y is one of `classes` labels, shown one-hot; the prediction is the classes' logits.

    classes: labels that there are.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    classes: Annotated[int, Field(ge=2)] = 4

    @property
    def output_size(self) -> int:
        return self.classes

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross-entropy in nats over the scored positions. prediction: logits [B, T, classes]."""
        return (self._cross_entropy(prediction, prompt) * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy (largest logits share what they win) and cross_entropy in nats, [B, T]."""
        top = (prediction == prediction.amax(-1, keepdim=True)).float()
        right = (top * prompt.targets).sum(-1) / top.sum(-1)
        return {"accuracy": right, "cross_entropy": self._cross_entropy(prediction, prompt)}

    def chance(self) -> Mapping[str, float]:
        """Of a guess at even odds."""
        return {"accuracy": 1 / self.classes, "cross_entropy": math.log(self.classes)}

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """Every label another one, so many further on, the same in a prompt: classes are all alike."""
        return corrupt_examples(prompt, self.layout, lambda xs, ys: (rotated(ys, generator), None), True)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """Example after example, the label by its number."""
        assert prompt.xs is not None
        assert prompt.ys is not None
        lines = []
        for x, label in zip(prompt.xs[row].tolist(), prompt.ys[row].argmax(-1).tolist(), strict=True):
            lines.append(f"{_numbers(x)} -> class {label}")
        return "\n".join(lines)

    @staticmethod
    def _cross_entropy(prediction: Tensor, prompt: Prompt) -> Tensor:
        return -(F.log_softmax(wide(prediction), -1) * prompt.targets).sum(-1)


@register(
    "task",
    "softmax_regression",
    family="functions",
    cases=({"dimensions": 4, "examples": 20, "classes": 3}, {"dimensions": 3, "examples": 16, "labels": "likeliest"}),
)
@dataclass(frozen=True)
class SoftmaxClassification(ClassTask):
    """One of several labels from a softmax model: P(y = c) proportional to exp(w_c . x), w_c ~ N(0, weight_scale^2 I).

    classes: labels that there are.
    weight_scale: standard deviation of each weight; the larger, the surer the labels.
    labels: "drawn" from their probabilities, or the "likeliest".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 3, "classes": 3, "examples": 30, "labels": "likeliest"},
        "hard": {"dimensions": 10, "classes": 5, "examples": 60, "weight_scale": 0.5},
    }

    dimensions: PositiveInt = 5
    weight_scale: PositiveFloat = 1.0
    labels: Labels = "drawn"

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        xs = self.draw_xs(batch, generator, device)
        shape = (batch, self.dimensions, self.classes)
        weights = self.weight_scale * torch.randn(shape, generator=generator, device=device)
        logits = xs @ weights
        if self.labels == "drawn":  # the largest of logits with Gumbel noise is a draw from the softmax
            logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        return Drawn(xs, F.one_hot(logits.argmax(-1), self.classes).to(xs), hidden={"weights": weights})

    def learners(self) -> dict[str, Learner]:
        """`softmax` first, in the form that `logistic` has in logistic_regression."""
        drawn = self.labels == "drawn"
        strength = (self.weight_scale if drawn else max(self.weight_scale, 10 / self.input_scale)) ** -2
        return {
            "softmax": SoftmaxRegression(strength, averaged=drawn),
            "softmax_map" if drawn else "softmax_averaged": SoftmaxRegression(strength, averaged=not drawn),
            "ridge": Ridge(self.dimensions * self.input_scale**2),
            "kernel_smoother": KernelSmoother(),
            "knn": NearestNeighbours(),
        }

    def splits(self) -> dict[str, Task]:
        """Shifts of the inputs and of the length, and 'surer labels'."""
        return super().splits() | {"surer labels": self.replace(weight_scale=4 * self.weight_scale)}
