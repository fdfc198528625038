"""Bursty classification: labels that can be memorized in the weights or read from the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.bursty import ClassPosterior
from contextlab.prompt import Learner, Prompt, Task, wide
from contextlab.registry import register
from contextlab.tasks.base import Drawn, ExamplesTask, Layout, corrupt_examples, rotated

Share = Annotated[float, Field(ge=0, le=1)]


@register(
    "task",
    "bursty_classification",
    family="recall",
    papers=("2312.03002", "2205.05055"),
    cases=({}, {"classes": 16, "labels": 4, "dimensions": 8, "layout": "paired"}, {"new": 0.5}),
)
@dataclass(frozen=True)
class BurstyClassification(ExamplesTask):
    """In-context against in-weights learning (2205.05055), with Gaussian items as in 2312.03002.

    A pool of classes, the same in all prompts, has means from N(0, I / d) and labels that repeat over the classes in
    turn. An item is (mean + noise e) / sqrt(1 + noise^2), e ~ N(0, I / d). Class k (from 1) is drawn with probability
    proportional to k ** -zipf. In a bursty prompt the context has few classes, `burst` items of each in random order,
    and the last item, whose label alone is scored, is of one of them. In other prompts all items are drawn one by one.
    So the label of the last item can be read from the context of bursty prompts, and memorized for all prompts.

    In prompts of new classes, which are bursty, means and labels are drawn for that prompt: only the context tells.

    dimensions: d, the size of an item.
    examples: items in a prompt, the last included.
    layout: "paired" has n tokens (x_i, x_{i-1}, y_{i-1}), "interleaved" has 2 n tokens (x_1, 0), (0, y_1), ...; labels
        are shown one-hot.
    classes: K, of the pool.
    labels: L, at most as many as classes.
    burst: B, items of each class in the context of a bursty prompt.
    bursty: share of bursty prompts.
    zipf: exponent of the classes' frequencies; 0 draws them uniformly.
    noise: of items within a class.
    new: share of prompts of new classes.
    swapped: all labels, of context and answer, are those of the pool plus 1: the context contradicts what was learned.
    unseen: no item of the context is of the last one's class (in prompts that are not bursty).
    seed: of the pool.
    """

    one_prediction: ClassVar[bool] = True
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 16, "classes": 16, "labels": 4},
        "hard": {"classes": 4096, "examples": 17, "burst": 4, "noise": 0.5},
    }

    dimensions: PositiveInt = 63
    examples: PositiveInt = 9
    layout: Layout = "interleaved"
    classes: PositiveInt = 256
    labels: PositiveInt = 32
    burst: PositiveInt = 2
    bursty: Share = 0.75
    zipf: NonNegativeFloat = 1.0
    noise: PositiveFloat = 0.1
    new: Share = 0.0
    swapped: bool = False
    unseen: bool = False
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.labels <= self.classes:
            raise InputError(f"labels {self.labels} must be 2 or more, and at most as many as classes, {self.classes}")
        context = self.examples - 1
        if context < 1 or context % self.burst:
            near = 1 + max(1, round(context / self.burst)) * self.burst
            raise InputError(
                f"examples {self.examples} are not one more than a multiple of burst {self.burst}; use {near}"
            )

    @property
    def output_size(self) -> int:
        return self.labels

    def pool(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Means [classes, d], labels [classes] int64 and probabilities [classes] of the pool."""
        weight = torch.arange(1, self.classes + 1, device=device, dtype=torch.float64) ** -self.zipf
        label = torch.arange(self.classes, device=device) % self.labels
        return _means(self.classes, self.dimensions, self.seed).to(device), label, weight / weight.sum()

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        """Items and one-hot labels. `hidden`: classes [batch, examples], -1 of new ones; bursty [batch, 1] bool."""
        context, d = self.examples - 1, self.dimensions
        means, label, prior = self.pool(device)
        chance = torch.rand(batch, 2, 1, generator=generator, device=device)
        new = chance[:, 0] < self.new
        bursty = (chance[:, 1] < self.bursty) | new

        # In a burst, the context is of the first few classes that were drawn, and the last item of one of them.
        uniform = torch.rand(batch, self.examples, generator=generator, device=device, dtype=torch.float64)
        share = prior.cumsum(0)
        last = torch.searchsorted(share, uniform[:, -1:].contiguous()).clamp(max=self.classes - 1)
        if self.unseen:
            # what is left of the unit interval without the last one's part, closed up
            part, start = prior[last], share[last] - prior[last]
            uniform = uniform * (1 - part)
            uniform = torch.where(uniform >= start, uniform + part, uniform)
        drawn = torch.searchsorted(share, uniform[:, :-1].contiguous()).clamp(max=self.classes - 1)
        order = torch.rand(batch, context, generator=generator, device=device).argsort(1)
        asked = torch.randint(context, (batch, 1), generator=generator, device=device)
        which = torch.cat([order, order.gather(1, asked)], 1) // self.burst
        classes = torch.where(bursty, drawn.gather(1, which), torch.cat([drawn, last], 1))

        answer, centre = label[classes], means[classes]
        if self.new:
            bursts = context // self.burst
            fresh = torch.randn(batch, bursts, d, generator=generator, device=device) / math.sqrt(d)
            named = torch.randint(self.labels, (batch, bursts), generator=generator, device=device)
            answer = torch.where(new, named.gather(1, which), answer)
            centre = torch.where(new.unsqueeze(2), fresh.gather(1, which.unsqueeze(2).expand(-1, -1, d)), centre)
            classes = classes.masked_fill(new, -1)
        if self.swapped:
            answer = (answer + 1) % self.labels
        noise = torch.randn(centre.shape, generator=generator, device=device) / math.sqrt(d)
        xs = (centre + self.noise * noise) / math.sqrt(1 + self.noise**2)
        ys = F.one_hot(answer, self.labels).to(xs)
        scored = (torch.arange(self.examples, device=device) == context).expand(batch, -1)
        return Drawn(xs, ys, scored, {"classes": classes, "bursty": bursty})

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """Every label another one, so many further on, the same in a prompt; of new classes alone (`new` is 1)."""
        if self.new < 1:
            raise InputError(
                "corrupt: the labels of the pool's classes are learned, no context gives others; use new 1"
            )
        found = corrupt_examples(prompt, self.layout, lambda xs, ys: (rotated(ys, generator), None), True)
        return replace(found, hidden=prompt.hidden)

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean cross-entropy in nats over the scored positions. prediction: logits [B, T, labels]."""
        return (self._cross_entropy(prediction, prompt) * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy (1 where the largest logit is the label's) and cross_entropy in nats, [B, T]."""
        right = (prediction.argmax(-1) == prompt.targets.argmax(-1)).float()
        return {"accuracy": right, "cross_entropy": self._cross_entropy(prediction, prompt)}

    @staticmethod
    def _cross_entropy(prediction: Tensor, prompt: Prompt) -> Tensor:
        return -(F.log_softmax(wide(prediction), -1) * prompt.targets).sum(-1)

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also the item's class ("rank": 1 for the most frequent, 0 for new ones), and "bursty": 0 or 1."""
        assert prompt.hidden is not None
        assert prompt.at is not None
        rank = torch.zeros_like(prompt.shot).index_copy(1, prompt.at, prompt.hidden["classes"] + 1)
        bursty = prompt.hidden["bursty"].long().expand_as(rank)
        return {**super().facets(prompt), "rank": rank, "bursty": bursty}

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The class of each item and its label, item after item."""
        assert prompt.ys is not None
        assert prompt.hidden is not None
        classes, labels = prompt.hidden["classes"][row].tolist(), prompt.ys[row].argmax(-1).tolist()
        names = ["a new class" if number < 0 else f"class {number}" for number in classes]
        shown = [f"item of {name} -> label {label}" for name, label in zip(names, labels, strict=True)]
        return "\n".join([*shown[:-1], f"item of {names[-1]} -> [label {labels[-1]}]"])

    def learners(self) -> dict[str, Learner]:
        """`class_posterior` (from memory and from what is shown), `in_weights`, `in_context`; the best of them first.

        None is the exact posterior of bursty prompts: the examples of a burst are looked at one by one.
        """
        pool = self.pool()
        found: dict[str, Learner] = {
            "class_posterior": ClassPosterior(*pool, self.noise, self.bursty, self.new),
            "in_weights": ClassPosterior(*pool, self.noise),
            "in_context": ClassPosterior(*pool, self.noise, new=1.0),
        }
        if self.swapped:
            return {name: found[name] for name in ("in_context", "class_posterior", "in_weights")}
        return found

    def splits(self) -> dict[str, Task]:
        """'train', then prompts that one way only answers: 'in_context' (new classes), 'swapped', and 'in_weights'."""
        return {
            "train": self,
            "in_context": self.replace(new=1.0),
            "swapped": self.replace(bursty=1.0, new=0.0, swapped=True),
            "in_weights": self.replace(bursty=0.0, new=0.0, unseen=True),
        }

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the labels."""
        return {"accuracy": 1 / self.labels, "cross_entropy": math.log(self.labels)}


@lru_cache(maxsize=16)
def _means(classes: int, dimensions: int, seed: int) -> Tensor:
    """Drawn on the CPU, so that they are the same on every device."""
    return torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(seed)) / math.sqrt(dimensions)
