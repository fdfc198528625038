"""LayerSkip: layers that are dropped at random, the upper ones more often, and a loss of early exits (2404.16710)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models.spec import ModelSpec
from contextlab.models.within import Within
from contextlab.prompt import Prompt, Task
from contextlab.spec import Spec

if TYPE_CHECKING:
    from contextlab.training.spec import TrainSpec


class LayerSkipSpec(Spec):
    """A training whose model can answer after any layer (LayerSkip, 2404.16710, section 4.1).

    Layer l of L, counted from 0, is left out with probability dropout x (2^(l / (L - 1)) - 1), for each prompt of a
    batch anew (eq. 2; what is kept is not scaled up). Beside the loss of the model's answers that of each early one,
    which the model's own norm and read-out make of the stream after the layer, is minimised (eq. 4): layer l counts for
    e(l) = scale (0 + 1 + .. + l), the last for L - 1 + scale (0 + 1 + .. + (L - 2)), over the sum of those that count
    (eq. 6). The loss that is reported is this mean. All tokens of a prompt skip a layer together.

    dropout: of the last layer; 0 drops none.
    scale: weight of the early answers; 0 trains the last one alone.
    rotate: only every so many layers answer at a step, others at the next (the paper's rotational curriculum; the last
        always does); 1: all do.
    rising: the dropout rises over the steps from 0, by 2^(t / (T - 1)) - 1 (eq. 3), for a training from nothing.
    """

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    scale: Annotated[float, Field(ge=0, le=1)] = 0.2
    rotate: PositiveInt = 1
    rising: bool = False

    def rates(self, layers: int, step: int = 0, steps: int = 1) -> list[float]:
        """How often each layer is left out at a step of so many."""
        now = self.dropout * (_growth(step, steps) if self.rising else 1.0)
        return [now * _growth(layer, layers) for layer in range(layers)]

    def weights(self, layers: int, step: int = 0) -> list[float]:
        """What the answer after each layer counts for at a step; 0 where it is not asked for."""
        each = [self.scale * layer * (layer + 1) / 2 for layer in range(layers - 1)]
        each.append(layers - 1 + (each[-1] if each else 1.0))
        answers = [layer == layers - 1 or (layer + step) % self.rotate == 0 for layer in range(layers)]
        total = sum(weight for weight, counts in zip(each, answers, strict=True) if counts)
        return [weight / total if counts else 0.0 for weight, counts in zip(each, answers, strict=True)]


def _growth(place: int, count: int) -> float:
    """From 0 at the first of `count` places to 1 at the last."""
    return math.exp(place * math.log(2) / (count - 1)) - 1 if count > 1 else 0.0


def check_layer_skip(spec: ModelSpec, skipping: LayerSkipSpec | None) -> None:
    """Raises InputError where a model of this spec cannot be trained so."""
    if skipping is None:
        return
    if spec.pool is not None:
        raise InputError("layer_skip: a pooled read-out answers once, after the last layer; leave out one of the two")
    if skipping.dropout and any(layer.kv == "shared" for layer in spec.pattern()):
        raise InputError("layer_skip: layers that read the keys of others need them; set dropout to 0")


@dataclass(frozen=True)
class Skips:
    """What one step asks of its readings.

    weights: of the answers after each layer, which sum to 1. dropped: [layers, B] bool, which prompts skip which.
    """

    weights: list[float]
    dropped: Tensor | None

    @classmethod
    def drawn(
        cls, spec: ModelSpec, train: TrainSpec, batch: int, step: int, generator: torch.Generator
    ) -> Skips | None:
        """For a batch of so many prompts, drawn from the generator; None where a training asks for nothing."""
        skipping = train.layer_skip
        if skipping is None:
            return None
        layers, dropped = spec.depth * spec.loops, None
        if skipping.dropout:
            rates = torch.tensor(skipping.rates(layers, step, train.steps), device=generator.device)
            dropped = torch.rand(layers, batch, generator=generator, device=generator.device) < rates[:, None]
        return cls(skipping.weights(layers, step), dropped)

    def within(self, rows: slice) -> Within:
        """What is asked of some of the prompts."""
        early: dict[int, Tensor | None] = {layer: None for layer, weight in enumerate(self.weights[:-1]) if weight}
        return Within(early=early, dropped=None if self.dropped is None else self.dropped[:, rows])

    def loss(self, task: Task, answers: Tensor, within: Within | None, prompt: Prompt) -> Tensor:
        """The mean of the losses after the layers, a scalar. answers: [B, T, k], the last ones."""
        total = self.weights[-1] * task.loss(answers, prompt)
        for layer, early in (within.early if within is not None and within.early else {}).items():
            assert early is not None
            total = total + self.weights[layer] * task.loss(early.to(answers.dtype), prompt)
        return total
