"""Composition: several hops through facts of the context, long multiplication, a dynamic programme."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask

MOST_PATHS = 1_000_000
"""Sequences of relations that are listed to set some of them apart."""

Part = Literal["train", "test"]


@dataclass(frozen=True)
class SolvedTask(TokenTask):
    """Base: a problem and its solution in one row of tokens, the solution fed back as it is predicted.

    Subclasses write the problems and solve them; everything else follows. A token of the solution is predicted at
    the position before it.
    """

    @abstractmethod
    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Problems [batch, P] int64."""

    @abstractmethod
    def solve(self, problems: Tensor) -> Tensor:
        """The solution [B, S] of problems [B, P]."""

    @abstractmethod
    def depth(self) -> Tensor:
        """Depth of each token of the solution in the computation graph, [S]; what needs the problem only has 1."""

    @property
    @abstractmethod
    def problem(self) -> int:
        """P, tokens in a problem."""

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw problems with their solutions, [batch, P + S - 1] tokens."""
        tokens = self.write(batch, generator, device)
        tokens = torch.cat([tokens, self.solve(tokens)], 1)
        shape = tokens[:, 1:].shape
        scored = (torch.arange(shape[1], device=tokens.device) >= self.problem - 1).expand(shape).clone()
        return Prompt(tokens[:, :-1], tokens[:, 1:], scored, torch.zeros_like(tokens[:, 1:]))

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """Also solved: 1 at every token of a prompt whose whole solution is right, each token given those before."""
        return with_solved(super().errors(prediction, prompt), prompt)

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "depth": of the token in the computation graph, so that partly right solutions show how far they go."""
        depth = F.pad(self.depth().to(prompt.inputs.device), (self.problem - 1, 0))
        return {**super().facets(prompt), "depth": depth.expand(prompt.batch, -1)}

    def learners(self) -> dict[str, Learner]:
        """`evaluator`, which solves the problem exactly."""
        return {"evaluator": Program(self._answers, self.input_size)}

    def _answers(self, tokens: Tensor) -> Tensor:
        """The solution's tokens, each at the position before it; 0 before the problem is known."""
        solution = self.solve(tokens[:, : self.problem])
        return F.pad(solution, (self.problem - 1, 0))


def with_solved(found: dict[str, Tensor], prompt: Prompt) -> dict[str, Tensor]:
    """A task's errors [B, T] and "solved" [B, T]: 1 at every token of a prompt of which all scored tokens are right."""
    right = (found["accuracy"] == 1) | ~prompt.scored
    return {**found, "solved": right.all(1, keepdim=True).float().expand_as(right)}


def kept(rest: Tensor, base: int, generator: torch.Generator, part: Part) -> Tensor:
    """The last digit [B] of problems, 0 .. base - 1, such that the sum of the digits puts them in the task's part.

    rest: the sum of the problem's other digits, [B]. Problems whose digits sum to `base - 1` modulo `base` are the
    test part; within a part, all problems are equally likely.
    """
    classes = torch.randint(base - 1, rest.shape, generator=generator, device=rest.device)
    if part == "test":
        classes = torch.full_like(classes, base - 1)
    return (classes - rest) % base


@register(
    "task",
    "long_multiplication",
    family="languages",
    papers=("2305.18654",),
    cases=({"digits": 2}, {"digits": 2, "form": "answer", "second_digits": 1}),
)
@dataclass(frozen=True)
class LongMultiplication(SolvedTask):
    """Multiplication of two numbers digit by digit, with or without the partial products (Faith and Fate, 2305.18654).

    The prompt is the two numbers, highest digit first, then `=`. The solution: for each digit of the second
    number, lowest first, its product with the first number, lowest digit first, ended by `+`; after the last, `:`
    and the product, lowest digit first. A token's "depth" counts the digits that it takes one after another: digit i
    of a partial product needs digit i - 1 for its carry, digit k of the product needs digit k - 1 and the
    partial digits of its column. So partly right solutions can be scored by depth and by digit. The paper's
    public graphs have further nodes for carries and residues, and its prompts are text.

    Problems whose digits sum to 9 modulo 10 are the test part.

    digits: of the first number.
    second_digits: of the second number; None for as many.
    form: "scratchpad", or "answer" for the product only.
    part: "train" or "test".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"digits": 2},
        "hard": {"digits": 5, "form": "answer"},
    }

    digits: PositiveInt = 3
    second_digits: PositiveInt | None = None
    form: Literal["scratchpad", "answer"] = "scratchpad"
    part: Part = "train"

    @property
    def second(self) -> int:
        """Digits of the second number."""
        return self.digits if self.second_digits is None else self.second_digits

    @property
    def problem(self) -> int:
        return self.digits + self.second + 2

    @property
    def input_size(self) -> int:
        return 14

    def symbol(self, token: int) -> str:
        """A digit or a sign."""
        return "0123456789*=+:"[token]

    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        digits = torch.randint(10, (batch, self.digits + self.second), generator=generator, device=device)
        for first, size in ((0, self.digits), (self.digits, self.second)):
            if size > 1:
                digits[:, first] = torch.randint(1, 10, (batch,), generator=generator, device=device)
        # A digit that may be 0 is the one that puts the problem in its part.
        free = 0 if self.digits == 1 else self.digits - 1
        digits[:, free] = 0
        digits[:, free] = kept(digits.sum(1), 10, generator, self.part)
        sign = digits.new_tensor([10, 11]).expand(batch, -1)
        return torch.cat([digits[:, : self.digits], sign[:, :1], digits[:, self.digits :], sign[:, 1:]], 1)

    def solve(self, problems: Tensor) -> Tensor:
        a, b = problems[:, : self.digits].flip(1), problems[:, self.digits + 1 : -1].flip(1)
        columns = problems.new_zeros(len(problems), self.digits + self.second)
        pieces = []
        for j in range(self.second):
            line = F.pad(a * b[:, j : j + 1], (0, 1))
            columns[:, j : j + self.digits + 1] += line
            ends = torch.full_like(a[:, :1], 12 if j + 1 < self.second else 13)
            pieces += [_carry(line), ends]
        product = _carry(columns)
        return product if self.form == "answer" else torch.cat([*pieces, product], 1)

    def depth(self) -> Tensor:
        product = torch.arange(self.digits + self.second) + 2
        if self.form == "answer":
            return product
        line = torch.arange(self.digits + 1) + 1
        return torch.cat([*[F.pad(line, (0, 1), value=1)] * self.second, product])

    def splits(self) -> dict[str, Task]:
        """'train', 'new problems', then one digit more in each number."""
        found: dict[str, Task] = {"train": self}
        if self.part == "train":
            found["new problems"] = self.replace(part="test")
        longer = self.replace(digits=self.digits + 1, second_digits=self.second + 1)
        return {**found, f"digits={self.digits + 1}": longer}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among all tokens."""
        return {"accuracy": 1 / self.input_size, "cross_entropy": math.log(self.input_size)}


def _carry(columns: Tensor) -> Tensor:
    """Decimal digits from sums in each place, lowest first, [B, n]."""
    carry, digits = torch.zeros_like(columns[:, 0]), []
    for column in columns.unbind(1):
        total = column + carry
        digits.append(total % 10)
        carry = total // 10
    return torch.stack(digits, 1)


@register(
    "task",
    "best_subset",
    family="languages",
    papers=("2305.18654",),
    cases=({"numbers": 4}, {"numbers": 3, "form": "answer"}),
)
@dataclass(frozen=True)
class BestSubset(SolvedTask):
    """The numbers of highest sum of which no two stand side by side (Faith and Fate's dynamic programme, 2305.18654).

    The prompt is the numbers, then `=`; the answer says of each number in order whether it is chosen (Y) or not (N).
    Among equally good answers the one counts that chooses earlier. The scratchpad gives before, from the last number
    to the first, the best sum of what stands from there on. A token's "depth" is its place in the solution: each
    needs the one before. As in the paper's public code, where the answers are lists of 1 and 2.

    Problems whose numbers, counted from the smallest, sum to -1 modulo how many values there are, are the test part.

    numbers: how many.
    most: numbers that there are token ids for; None for twice as many as `numbers`.
    largest: numbers are uniform in -largest .. largest.
    form: "scratchpad" or "answer".
    part: "train" or "test".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"numbers": 4},
        "hard": {"numbers": 12, "form": "answer"},
    }

    numbers: Annotated[int, Field(ge=2)] = 6
    most: PositiveInt | None = None
    largest: PositiveInt = 5
    form: Literal["scratchpad", "answer"] = "scratchpad"
    part: Part = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.numbers > self.limit:
            raise InputError(
                f"numbers {self.numbers} are too many: there are ids for {self.limit}; use most {self.numbers}"
            )

    @property
    def limit(self) -> int:
        """Numbers that there are token ids for."""
        return 2 * self.numbers if self.most is None else self.most

    @property
    def problem(self) -> int:
        return self.numbers + 1

    @property
    def highest(self) -> int:
        """The highest sum that `limit` numbers can have; numbers have ids from -largest to it."""
        return self.largest * ((self.limit + 1) // 2)

    @property
    def input_size(self) -> int:
        return self.largest + self.highest + 1 + 3

    def symbol(self, token: int) -> str:
        """A number, =, Y or N."""
        value = token - self.largest
        return str(value) if value <= self.highest else "=YN"[value - self.highest - 1]

    def write(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        values = 2 * self.largest + 1
        rest = torch.randint(values, (batch, self.numbers - 1), generator=generator, device=device)
        last = kept(rest.sum(1), values, generator, self.part).unsqueeze(1)
        return torch.cat([rest, last, torch.full_like(last, self.largest + self.highest + 1)], 1)

    def solve(self, problems: Tensor) -> Tensor:
        value = problems[:, :-1] - self.largest
        zero = torch.zeros_like(value[:, 0])
        best = [zero, zero]
        for number in value.flip(1).unbind(1):
            best.append(torch.maximum(best[-1], number + best[-2]))
        # best[k + 1] is for the last k numbers
        free, chosen = torch.ones_like(zero, dtype=torch.bool), []
        for i, number in enumerate(value.unbind(1)):
            k = self.numbers - i
            choose = free & (best[k + 1] == number + best[k - 1])
            chosen.append(torch.where(choose, 1, 2) + self.largest + self.highest + 1)
            free = ~choose
        answer = torch.stack(chosen, 1)
        if self.form == "answer":
            return answer
        return torch.cat([torch.stack(best[2:], 1) + self.largest, answer], 1)

    def depth(self) -> Tensor:
        return torch.arange(self.numbers * (2 if self.form == "scratchpad" else 1)) + 1

    def splits(self) -> dict[str, Task]:
        """'train', 'new problems', then as many numbers as there are ids for."""
        found: dict[str, Task] = {"train": self}
        if self.part == "train":
            found["new problems"] = self.replace(part="test")
        if self.numbers < self.limit:
            found[f"numbers={self.limit}"] = self.replace(numbers=self.limit, most=self.limit)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among all tokens."""
        return {"accuracy": 1 / self.input_size, "cross_entropy": math.log(self.input_size)}


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
        """Guessing evenly among the entities."""
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
