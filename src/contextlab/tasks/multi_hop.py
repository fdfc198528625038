"""Several hops through facts of the context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask
from contextlab.tasks.composition import Part

MOST_PATHS = 1_000_000
"""Sequences of relations that are listed to set some of them apart."""


@register(
    "task",
    "multi_hop",
    family="languages",
    papers=("2305.18654",),
    cases=(
        {"entities": 5, "relations": 2, "queries": 3},
        {"entities": 5, "relations": 2, "queries": 2, "hops": 3, "steps": True},
    ),
)
@dataclass(frozen=True)
class MultiHop(TokenTask):
    """Facts in the context, then questions that need several of them one after another.

    A fact is three tokens: entity, relation, entity; each relation maps the entities one to one, anew in each prompt,
    and all facts are shown in random order. A question is an entity, `hops` relations to follow from it, and `=`;
    then comes the answer, with `steps` after the entities on the way. All of these are scored; at the `=` and on.
    `shot` is the number of questions seen before. Composition as in 2305.18654's definition of multi-step problems;
    the task is not in that paper.

    One in 4 sequences of relations, drawn by `path_seed`, is kept for the test part, where there are at least 4.

    entities: number of entities.
    relations: number of relations.
    hops: relations to follow in a question.
    queries: questions in a prompt.
    steps: show and score the entities on the way.
    part: "train" or "test".
    path_seed: of the sequences kept for the test part.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"entities": 4, "relations": 2, "queries": 2, "steps": True},
        "hard": {"entities": 16, "relations": 4, "hops": 4},
    }

    entities: Annotated[int, Field(ge=2)] = 8
    relations: PositiveInt = 4
    hops: PositiveInt = 2
    queries: PositiveInt = 4
    steps: bool = False
    part: Part = "train"
    path_seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relations**self.hops > MOST_PATHS:
            most = int(math.log(MOST_PATHS) / math.log(self.relations) + 1e-9)
            raise InputError(
                f"hops {self.hops} are too many: {self.relations} relations make more than {MOST_PATHS} sequences of "
                f"so many; at most {most}"
            )
        if self.part == "test" and self.relations**self.hops < 4:
            raise InputError(
                f"part 'test' needs at least 4 sequences of relations, and {self.relations} relations with hops "
                f"{self.hops} make {self.relations**self.hops}; use relations 4"
            )

    @property
    def input_size(self) -> int:
        return self.entities + self.relations + 1

    @property
    def facts(self) -> int:
        """Tokens of the facts."""
        return 3 * self.entities * self.relations

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return self.hops if self.steps else 1

    @property
    def question(self) -> int:
        """Tokens of a question and its answer."""
        return 2 + self.hops + self.answer

    def symbol(self, token: int) -> str:
        """Entities as e0, e1, ..., relations as r0, r1, ..., and =."""
        if token < self.entities:
            return f"e{token}"
        return "=" if token == self.input_size - 1 else f"r{token - self.entities}"

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The facts in one line, then each question with its answers in brackets."""
        parts = super().words(prompt, row).split(" ")
        facts = [" ".join(parts[i : i + 3]) for i in range(0, self.facts, 3)]
        rest = range(self.facts, len(parts), self.question)
        return "; ".join(facts) + "\n" + "\n".join(" ".join(parts[i : i + self.question]) for i in rest)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts of facts + queries * question - 1 tokens."""

        def rand(*shape: int) -> Tensor:
            return torch.rand(batch, *shape, generator=generator, device=device)

        maps = rand(self.relations, self.entities).argsort(2)  # [B, R, E]
        number = torch.arange(self.relations * self.entities, device=device)
        facts = torch.stack(
            [
                (number % self.entities).expand(batch, -1),
                (number // self.entities + self.entities).expand(batch, -1),
                maps.flatten(1),
            ],
            2,
        )
        order = rand(len(number)).argsort(1).unsqueeze(2).expand(-1, -1, 3)
        facts = facts.gather(1, order).flatten(1)

        possible = paths(self).to(device)
        chosen = torch.randint(len(possible), (batch, self.queries), generator=generator, device=device)
        path = possible[chosen]  # [B, Q, hops]
        here = torch.randint(self.entities, (batch, self.queries), generator=generator, device=device)
        start, way, table = here, [], maps.flatten(1)
        for relation in path.unbind(2):
            here = table.gather(1, relation * self.entities + here)
            way.append(here)
        question = torch.cat(
            [
                start.unsqueeze(2),
                path + self.entities,
                torch.full_like(start, self.input_size - 1).unsqueeze(2),
                torch.stack(way if self.steps else way[-1:], 2),
            ],
            2,
        )
        tokens = torch.cat([facts, question.flatten(1)], 1)
        scored, shot = self._asked(tokens.device)
        return Prompt(tokens[:, :-1], tokens[:, 1:], scored.expand(batch, -1).clone(), shot.expand(batch, -1).clone())

    def _asked(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where answers are predicted, [T] bool, and the questions seen before, [T]."""
        at = torch.arange(self.facts + self.queries * self.question - 1, device=device) - self.facts
        scored = (at >= 0) & (at % self.question >= self.hops + 1) & (at % self.question <= self.hops + self.answer)
        return scored, (at // self.question).clamp(min=0)

    def _answers(self, tokens: Tensor) -> Tensor:
        """The answers, looked up in the facts as they stand in the tokens."""
        batch, length = tokens.shape
        fact = tokens[:, : self.facts].view(batch, -1, 3)
        cell = (fact[..., 1] - self.entities) * self.entities + fact[..., 0]
        table = torch.zeros_like(cell).scatter_(1, cell, fact[..., 2])
        rest = F.pad(tokens[:, self.facts :], (0, 1)).view(batch, self.queries, self.question)
        here, way = rest[..., 0], []
        for i in range(self.hops):
            here = table.gather(1, (rest[..., 1 + i] - self.entities) * self.entities + here)
            way.append(here)
        answer = torch.stack(way if self.steps else way[-1:], 2)
        placed = F.pad(answer, (self.hops + 1, 1)).flatten(1)  # the last token of an answer predicts nothing
        return F.pad(placed, (self.facts, 0))[:, :length]

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, which looks up one fact after another."""
        return {"evaluator": Program(self._answers, self.input_size)}

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "depth": facts that the answer needs, one after another."""
        at = torch.arange(prompt.length, device=prompt.inputs.device) - self.facts
        depth = (at % self.question - self.hops).clamp(0, self.hops) if self.steps else torch.full_like(at, self.hops)
        return {**super().facets(prompt), "depth": depth.expand(prompt.batch, -1)}

    def splits(self) -> dict[str, Task]:
        """'train', 'new paths' (sequences of relations that training does not ask for), then one hop more."""
        found: dict[str, Task] = {"train": self}
        if self.part == "train" and self.relations**self.hops >= 4:
            found["new paths"] = self.replace(part="test")
        if self.relations ** (self.hops + 1) <= MOST_PATHS:
            found[f"hops={self.hops + 1}"] = self.replace(hops=self.hops + 1)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the entities."""
        return {"accuracy": 1 / self.entities, "cross_entropy": math.log(self.entities)}


@lru_cache(maxsize=32)
def _all_paths(relations: int, hops: int, seed: int) -> tuple[Tensor, Tensor]:
    """The sequences of relations of the train and of the test part, each [n, hops]."""
    count = relations**hops
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    digits = relations ** torch.arange(hops)
    every = order.unsqueeze(1) // digits % relations
    return every[count // 4 :], every[: count // 4]


def paths(task: MultiHop) -> Tensor:
    """The sequences of relations that the task asks for, [n, hops]."""
    train, test = _all_paths(task.relations, task.hops, task.path_seed)
    return train if task.part == "train" else test
