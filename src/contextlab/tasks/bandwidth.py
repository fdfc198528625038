"""Questions about a whole list: what must cross from the context to the answer (BAPO), and counting and copying."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask

Problem = Literal["index", "equality", "match2", "match3", "majority", "median", "reachability"]


@register(
    "task",
    "bandwidth",
    family="languages",
    papers=("2505.08140",),
    cases=tuple(
        {"problem": name, "items": 8, "values": 9}
        for name in ("index", "equality", "match2", "match3", "majority", "median", "reachability")
    ),
)
@dataclass(frozen=True)
class Bandwidth(TokenTask):
    """One question about a list, asked at its end (bounded attention prefix oracles, BAPO, 2505.08140).

    There the problems are told apart by how much must be carried from the first part of the input to the answer. Easy
    are "index" (the item at the place named last) and "equality" (of the two halves) and "match2"; hard are "match3",
    "majority", "median" and "reachability". As they are stated here:

    "match2" and "match3": is there an item, or are there two at different places, that make a multiple of `values`
    together with the last number. "majority": are there more 1 than 0 among the items. "median": the item of
    rank (items + 1) // 2 from below. "reachability": of edges `a b` in random order, which make two paths of
    items / 2 nodes each, does the path from the first node named last end in the second. Answers yes and no are
    equally likely, but for "majority" of an even number of items, where a tie is a no. The paper's own
    prompts are text; how its instances were drawn is not known here.

    problem: which.
    items: numbers in the list, nodes for "reachability".
    values: items are 0 .. values - 1; also the names of places and of nodes.
    """

    one_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"problem": "index", "items": 8, "values": 16},
        "hard": {"problem": "reachability", "items": 64, "values": 128},
    }

    problem: Problem = "reachability"
    items: Annotated[int, Field(ge=2)] = 16
    values: Annotated[int, Field(ge=2)] = 65

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem in ("index", "reachability") and self.items > self.values:
            raise InputError(
                f"items {self.items} do not fit: {self.problem} names each by one of {self.values} values; at most "
                f"{self.values}"
            )
        if self.problem in ("equality", "reachability") and self.items % 2:
            raise InputError(
                f"items {self.items} cannot be divided in two halves for {self.problem}; use {self.items + 1}"
            )
        if self.problem == "reachability" and self.items < 4:
            raise InputError(f"items {self.items} are too few for two paths of at least one edge; use 4")
        if self.problem == "match3" and self.values % 2 == 0:
            raise InputError(f"values {self.values} is even, and match3 needs an odd number; use {self.values + 1}")

    @property
    def input_size(self) -> int:
        return self.values + 3

    def symbol(self, token: int) -> str:
        """A number, ?, no or yes."""
        return str(token) if token < self.values else ("?", "no", "yes")[token - self.values]

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """For "reachability", edges as a>b; else the tokens."""
        text = super().words(prompt, row)
        if self.problem != "reachability":
            return text
        parts = text.split(" ")
        edges = [f"{a}>{b}" for a, b in zip(parts[:-3:2], parts[1:-3:2], strict=True)]
        return " ".join([*edges, "|", f"{parts[-3]}>..>{parts[-2]}", parts[-1]])

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: the list, what the question names, and ?, where the answer is predicted."""
        numbers = getattr(self, f"_draw_{self.problem}")(batch, generator, device)
        inputs = torch.cat([numbers, torch.full_like(numbers[:, :1], self.values)], 1)
        targets = self._answers(inputs)
        scored = torch.zeros_like(inputs, dtype=torch.bool)
        scored[:, -1] = True
        return Prompt(inputs, targets, scored, torch.zeros_like(inputs))

    def _numbers(self, *draw: Any, without: int = 0) -> Tensor:
        """Numbers below values - without, [B, items]."""
        batch, generator, device = draw
        return torch.randint(self.values - without, (batch, self.items), generator=generator, device=device)

    def _coins(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        return torch.rand(batch, 1, generator=generator, device=device) < 0.5

    def _places(self, batch: int, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Different places in the list, [B, count]."""
        return torch.rand(batch, self.items, generator=generator, device=device).argsort(1)[:, :count]

    def _draw_index(self, *draw: Any) -> Tensor:
        return torch.cat([self._numbers(*draw), self._places(draw[0], 1, *draw[1:])], 1)

    def _draw_equality(self, *draw: Any) -> Tensor:
        half = self._numbers(*draw)[:, : self.items // 2]
        place = self._places(draw[0], 1, *draw[1:]) % (self.items // 2)
        shift = 1 + self._numbers(*draw, without=1)[:, :1]
        other = half.scatter_add(1, place, shift) % self.values
        return torch.cat([half, torch.where(self._coins(*draw), half, other)], 1)

    def _draw_match2(self, *draw: Any) -> Tensor:
        last = self._numbers(*draw)[:, :1]
        partner = -last % self.values
        # uniform among all but the partner, then the partner at one place for half of the prompts
        others = self._numbers(*draw, without=1)
        others = others + (others >= partner)
        place = self._places(draw[0], 1, *draw[1:])
        return torch.cat([torch.where(self._coins(*draw), others.scatter(1, place, partner), others), last], 1)

    def _draw_match3(self, *draw: Any) -> Tensor:
        batch, generator, device = draw
        last = self._numbers(*draw)[:, :1]
        rest = -last % self.values
        # Of each two values that make the rest, one is allowed; the value that makes it with itself is not.
        itself = rest * ((self.values + 1) // 2) % self.values
        others = self._numbers(*draw, without=1)
        others = others + (others >= itself)
        partner = (rest - others) % self.values
        coins = torch.rand(batch, self.values, generator=generator, device=device) < 0.5
        lower = torch.minimum(others, partner)
        others = torch.where(coins.gather(1, lower), lower, torch.maximum(others, partner))
        place = self._places(draw[0], 2, *draw[1:])
        found = others.scatter(1, place[:, :1], (rest - others.gather(1, place[:, 1:])) % self.values)
        return torch.cat([torch.where(self._coins(*draw), found, others), last], 1)

    def _draw_majority(self, *draw: Any) -> Tensor:
        batch, generator, device = draw
        return torch.randint(2, (batch, self.items), generator=generator, device=device)

    def _draw_median(self, *draw: Any) -> Tensor:
        return self._numbers(*draw)

    def _draw_reachability(self, *draw: Any) -> Tensor:
        batch, generator, device = draw
        half = self.items // 2
        nodes = torch.rand(batch, self.values, generator=generator, device=device).argsort(1)[:, : self.items]
        path = nodes.view(batch, 2, half)
        edges = torch.stack([path[..., :-1], path[..., 1:]], 3).flatten(1, 2)
        order = torch.rand(edges.shape[:2], generator=generator, device=device).argsort(1)
        edges = edges.gather(1, order.unsqueeze(2).expand(-1, -1, 2)).flatten(1)
        end = path[..., -1].gather(1, self._coins(*draw).long())
        return torch.cat([edges, path[:, 0, :1], end], 1)

    def _answers(self, tokens: Tensor) -> Tensor:
        """The answer at the last position; 0 before."""
        numbers = tokens[:, :-1]
        items, last = numbers[:, : self.items], numbers[:, -1]
        size = self.values
        if self.problem == "index":
            answer = items.gather(1, last.unsqueeze(1)).squeeze(1)
        elif self.problem == "median":
            answer = items.sort(1).values[:, (self.items + 1) // 2 - 1]
        else:
            if self.problem == "equality":
                yes = (items[:, : self.items // 2] == items[:, self.items // 2 :]).all(1)
            elif self.problem == "majority":
                yes = 2 * items.sum(1) > self.items
            elif self.problem == "match2":
                yes = ((items + last.unsqueeze(1)) % size == 0).any(1)
            elif self.problem == "match3":
                pairs = items.unsqueeze(1) + items.unsqueeze(2) + last[:, None, None]
                same = torch.eye(self.items, dtype=torch.bool, device=tokens.device)
                yes = ((pairs % size == 0) & ~same).any(2).any(1)
            else:
                yes = self._reached(numbers)
            answer = torch.where(yes, size + 2, size + 1)
        return torch.nn.functional.pad(answer.unsqueeze(1), (tokens.shape[1] - 1, 0))

    def _reached(self, numbers: Tensor) -> Tensor:
        edges = numbers[:, :-2].view(len(numbers), -1, 2)
        nodes = torch.arange(self.values, device=numbers.device).expand(len(numbers), -1)
        after = nodes.scatter(1, edges[..., 0], edges[..., 1])  # a node without an edge leads to itself
        here = numbers[:, -2:-1]
        for _ in range(self.items // 2):
            here = after.gather(1, here)
        return here.squeeze(1) == numbers[:, -1]

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, which computes the answer from the whole list."""
        return {"evaluator": Program(self._answers, self.input_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then twice as many items where there are names for them."""
        if self.problem in ("index", "reachability") and 2 * self.items > self.values:
            return {"train": self}
        return {"train": self, f"items={2 * self.items}": self.replace(items=2 * self.items)}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly between yes and no, or among the values."""
        possible = self.values if self.problem in ("index", "median") else 2
        return {"accuracy": 1 / possible, "cross_entropy": math.log(possible)}


@register(
    "task",
    "count_and_copy",
    family="languages",
    papers=("2406.04267",),
    cases=({"ask": "count", "longest": 20}, {"ask": "last", "longest": 20}),
)
@dataclass(frozen=True)
class CountAndCopy(TokenTask):
    """Long runs of ones: how many there are, or what stands first or last (representational collapse, 2406.04267).

    Asked to "count": the number of ones among n bits, each 1 with probability `ones` (the paper has all ones, and
    0.7). Asked for the "first" or the "last" bit: it is 0 or 1, equally likely (in the paper 0), and the others are
    ones, or alternate where `rest` says so. n is uniform; the longer the run, the nearer are the representations of
    n and n + 1 ones, until the precision of the numbers no longer tells them apart.

    ask: "count", "first" or "last".
    ones: probability of a 1 where they are counted.
    rest: "ones" or "alternating", what stands beside the bit asked for.
    shortest: fewest bits.
    longest: most bits; a prompt has one token more.
    most: the largest number that there is an id for; None for twice `longest`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"ask": "last", "longest": 32},
        "hard": {"ask": "count", "ones": 0.7, "longest": 256},
    }

    ask: Literal["count", "first", "last"] = "count"
    ones: Annotated[float, Field(gt=0, le=1)] = 1.0
    rest: Literal["ones", "alternating"] = "ones"
    shortest: PositiveInt = 1
    longest: PositiveInt = 64
    most: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest > self.longest:
            raise InputError(f"shortest {self.shortest} is more than longest {self.longest}; at most {self.longest}")
        if self.longest > self.limit:
            raise InputError(f"longest {self.longest} has no id: numbers go up to most {self.limit}")

    @property
    def limit(self) -> int:
        """The largest number that there is an id for."""
        return 2 * self.longest if self.most is None else self.most

    @property
    def input_size(self) -> int:
        return 4 + self.limit + 1

    def symbol(self, token: int) -> str:
        """A bit, ?, _ for nothing, or #n for the number n."""
        return "01?_"[token] if token < 4 else f"#{token - 4}"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts of longest + 1 tokens: the bits, ?, where the answer is predicted, and nothing after."""
        shape = (batch, self.longest + 1)
        length = torch.randint(self.shortest, self.longest + 1, (batch, 1), generator=generator, device=device)
        at = torch.arange(self.longest + 1, device=device).expand(shape)
        if self.ask == "count":
            bits = (torch.rand(shape, generator=generator, device=device) < self.ones).long()
        else:
            place = torch.zeros_like(length) if self.ask == "first" else length - 1
            bit = torch.randint(2, (batch, 1), generator=generator, device=device)
            beside = torch.ones_like(at) if self.rest == "ones" else at % 2
            bits = torch.where(at == place, bit, beside)
        inputs = torch.where(at < length, bits, torch.where(at == length, 2, 3))
        return Prompt(inputs, self._answers(inputs), at == length, at.clone())

    def _answers(self, tokens: Tensor) -> Tensor:
        """What the answer would be at each position, from the bits before."""
        if self.ask == "count":
            return (tokens == 1).long().cumsum(1).clamp(max=self.limit) + 4
        if self.ask == "first":
            return tokens[:, :1].expand_as(tokens).contiguous()
        return torch.cat([tokens[:, :1], tokens[:, :-1]], 1)

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """Where ones are counted, also count_error: by how much the likeliest number is wrong."""
        found = super().errors(prediction, prompt)
        if self.ask == "count":
            found["count_error"] = (prediction[..., 4:].argmax(-1) + 4 - prompt.targets).abs().float()
        return found

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, which counts, or looks at the place."""
        return {"evaluator": Program(self._answers, self.input_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then 'longer' up to the largest number that there is an id for."""
        if self.longest == self.limit:
            return {"train": self}
        longer = self.replace(shortest=self.longest + 1, longest=self.limit, most=self.limit)
        return {"train": self, "longer": longer}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the numbers from 0 to `longest`, or between 0 and 1."""
        possible = self.longest + 1 if self.ask == "count" else 2
        return {"accuracy": 1 / possible, "cross_entropy": math.log(possible)}
