"""Recall of vectors: random keys with random values, then some of the keys again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.vectors import VectorLookup
from contextlab.prompt import Learner, Prompt, Task, _numbers, wide
from contextlab.registry import register
from contextlab.tasks.base import check_options
from contextlab.tasks.corrupting import chosen_of


@register(
    "task", "vector_recall", family="recall", papers=("2402.04248",), cases=({"pairs": 8}, {"pairs": 4, "queries": 4})
)
@dataclass(frozen=True)
class VectorRecall(Task):
    """Vector-valued associative recall: key, value, key, value, ..., then keys whose values are asked for (2402.04248).

    All vectors are uniform on the sphere of radius sqrt(d). The last `queries` tokens are different keys of the
    prompt, in random order; at each of them its value is the target. `shot` is the number of pairs.

    dimensions: d, the size of keys and values.
    pairs: key-value pairs.
    queries: keys asked for.
    """

    metric: ClassVar[str] = "squared_error"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 8, "pairs": 4},
        "hard": {"dimensions": 20, "pairs": 256, "queries": 16},
    }

    dimensions: PositiveInt = 20
    pairs: PositiveInt = 64
    queries: PositiveInt = 1

    def __post_init__(self) -> None:
        check_options(self)
        if self.queries > self.pairs:
            raise InputError(f"queries {self.queries} are more than the {self.pairs} pairs; at most {self.pairs}")

    @property
    def input_size(self) -> int:
        return self.dimensions

    @property
    def output_size(self) -> int:
        return self.dimensions

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts of 2 * pairs + queries vectors, float32."""
        shape = (batch, self.pairs, 2, self.dimensions)
        pairs = F.normalize(torch.randn(shape, generator=generator, device=device), dim=-1) * self.dimensions**0.5
        order = torch.rand(batch, self.pairs, generator=generator, device=device)
        asked = order.topk(self.queries, dim=1).indices[..., None, None].expand(-1, -1, *shape[2:])
        keys, values = pairs.gather(1, asked).unbind(2)
        inputs = torch.cat([pairs.flatten(1, 2), keys], 1)
        length, start = inputs.shape[1], 2 * self.pairs
        targets = torch.zeros_like(inputs)
        targets[:, start:] = values
        place = torch.arange(length, device=device)
        scored = (place >= start).expand(batch, -1)
        shot = ((place + 1) // 2).clamp(max=self.pairs).expand(batch, -1)
        return Prompt(inputs, targets, scored, shot)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The key that is asked for last and another one in each other's pairs."""
        if self.pairs == 1:
            raise InputError("corrupt: with one pair its value is the only answer; use 2 pairs or more")
        start = 2 * self.pairs
        pairs, asked = prompt.inputs[:, :start].unflatten(1, (-1, 2)), prompt.inputs[:, start:]
        here = (pairs[:, :, 0] == asked[:, -1:]).all(2)
        number, _ = chosen_of(~here, generator)
        order = torch.arange(self.pairs, device=here.device).expand_as(here)
        one = here.int().argmax(1, keepdim=True)
        order = order.scatter(1, one, number).scatter(1, number, one)
        keys = pairs[:, :, 0].gather(1, order.unsqueeze(2).expand(-1, -1, self.dimensions))
        found = (asked.unsqueeze(2) == keys.unsqueeze(1)).all(3).int().argmax(2, keepdim=True)
        values = pairs[:, :, 1].gather(1, found.expand(-1, -1, self.dimensions))
        inputs = torch.cat([torch.stack([keys, pairs[:, :, 1]], 2).flatten(1, 2), asked], 1)
        return replace(prompt, inputs=inputs, targets=torch.cat([prompt.targets[:, :start], values], 1))

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """Mean squared error at the queries, summed over coordinates. prediction: [B, T, d]."""
        return (self.errors(prediction, prompt)["squared_error"] * prompt.scored).sum() / prompt.scored.sum()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """squared_error [B, T], summed over coordinates."""
        return {"squared_error": (wide(prediction) - prompt.targets).square().sum(-1)}

    def learners(self) -> dict[str, Learner]:
        """`lookup`, which makes no error, and `attention`, one softmax of the inner products at scale 1 / sqrt(d)."""
        return {"lookup": VectorLookup(self.pairs), "attention": VectorLookup(self.pairs, self.dimensions**0.5)}

    def splits(self) -> dict[str, Task]:
        """'train', then half and double the pairs, and more queries."""
        found: dict[str, Task] = {"train": self}
        for pairs in (self.pairs // 2, 2 * self.pairs):
            if pairs:
                found[f"pairs={pairs}"] = self.replace(pairs=pairs, queries=min(self.queries, pairs))
        if (more := min(4 * self.queries, self.pairs)) > self.queries:
            found[f"queries={more}"] = self.replace(queries=more)
        return found

    def chance(self) -> Mapping[str, float]:
        """The squared error of predicting zero."""
        return {"squared_error": float(self.dimensions)}

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """Key -> value, and [the answer] after each query."""
        tokens, start = prompt.inputs[row].tolist(), 2 * self.pairs
        lines = [f"{_numbers(tokens[t])} -> {_numbers(tokens[t + 1])}" for t in range(0, start, 2)]
        for query, answer in zip(tokens[start:], prompt.targets[row, start:].tolist(), strict=True):
            lines.append(f"{_numbers(query)}   [{_numbers(answer)}]")
        return "\n".join(lines)
