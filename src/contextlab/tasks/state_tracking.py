"""State tracking: the state after each of a stream of changes (group words, counters), the contents of boxes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask

MOST_ELEMENTS = 1000
"""Elements of a group at most; its table has their square."""


@register(
    "task",
    "group_word",
    family="state tracking",
    papers=("2404.08819",),
    cases=(
        {"group": "Z2", "length": 12},
        {"group": "Z7", "length": 12, "elements": "generators"},
        {"group": "S3", "length": 16, "elements": "swaps"},
        {"group": "A4xZ5", "length": 8},
    ),
)
@dataclass(frozen=True)
class GroupWord(TokenTask):
    """The word problem of a group: after each element, the product of all so far (2404.08819).

    Z2 is the parity of a stream of bits, Zm is addition modulo m, S3, A5 and S5 are permutations. The paper's point:
    what constant-depth transformers and linear state-space models compute is in TC0, and words of A5 and S5 are not,
    unless TC0 = NC1. A token is an element, and the target at its place is the state after it. The product of two
    permutations applies the left one first; element 0 is the identity, and all are numbered in the order of what they
    make of 1, 2, ...

    group: a cyclic (Z2, Z60), symmetric (S3) or alternating group (A5), or a direct product of such (A4xZ5).
    length: elements in the word.
    elements: that are drawn, evenly: "all"; "generators" (of Zm 0 and 1, of Sn one swap and one cycle of all, of An
        the cycles (1 2 k), of a product those of its parts); "swaps" (of Sn, and the identity).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"group": "Z2", "length": 16},
        "hard": {"group": "S5", "length": 128},
    }

    group: str = "S5"
    length: PositiveInt = 32
    elements: Literal["all", "generators", "swaps"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[ZSA]\d{1,4}(x[ZSA]\d{1,4})*", self.group):
            raise InputError(
                f"group {self.group[:40]!r} is unknown: use a cyclic group such as Z60, a symmetric one such as S5, "
                "an alternating one such as A5, or a product such as A4xZ5"
            )
        order = 1
        for kind, size in _factors(self.group):
            if size < (least := {"Z": 2, "S": 2, "A": 3}[kind]):
                raise InputError(
                    f"group {kind}{size} has one element or none; the smallest of its kind is {kind}{least}"
                )
            order *= size if kind == "Z" else math.factorial(min(size, 10)) // (2 if kind == "A" else 1)
        if order > MOST_ELEMENTS:
            raise InputError(f"group {self.group} has more than {MOST_ELEMENTS} elements; at most S6, A6 or Z1000")
        if self.elements == "swaps" and not (self.group.startswith("S") and "x" not in self.group):
            raise InputError(f"elements 'swaps' needs a symmetric group such as S5, and the group is {self.group}")

    @property
    def input_size(self) -> int:
        return len(group_of(self.group).names)

    def symbol(self, token: int) -> str:
        """A number, a permutation in cycles ('e' for the identity), or a tuple of such."""
        return group_of(self.group).names[token]

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw words: inputs and targets [batch, length] int64, all scored; `shot` is the elements before."""
        group = group_of(self.group)
        drawn = torch.tensor(group.drawn(self.elements), device=device)
        inputs = drawn[torch.randint(len(drawn), (batch, self.length), generator=generator, device=device)]
        table, state = group.table.to(device), torch.zeros(batch, dtype=torch.int64, device=device)
        targets = []
        for element in inputs.unbind(1):
            state = table[state, element]
            targets.append(state)
        shot = torch.arange(self.length, device=device).expand(batch, -1)
        return Prompt(inputs, torch.stack(targets, 1), torch.ones_like(inputs, dtype=torch.bool), shot)

    def products(self, tokens: Tensor) -> Tensor:
        """The product of the elements [B, T] up to each place, [B, T].

        Found in log2(length) steps, each of which doubles their span.
        """
        table, span = group_of(self.group).table.to(tokens.device), 1
        while span < tokens.shape[1]:
            tokens = torch.cat([tokens[:, :span], table[tokens[:, :-span], tokens[:, span:]]], 1)
            span *= 2
        return tokens

    def learners(self) -> dict[str, Learner]:
        """`product`, which makes no error."""
        return {"product": Program(self.products, self.output_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then 'length=N' with twice and four times the elements."""
        return {"train": self, **{f"length={n}": self.replace(length=n) for n in (2 * self.length, 4 * self.length)}}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the elements."""
        return {"accuracy": 1 / self.output_size, "cross_entropy": math.log(self.output_size)}


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group; element 0 is the identity.

    names: of the elements.
    table: [G, G] int64, the product of row and column.
    generators: elements that make all others.
    swaps: the identity and the transpositions, of a symmetric group.
    """

    names: tuple[str, ...]
    table: Tensor
    generators: tuple[int, ...]
    swaps: tuple[int, ...] = ()

    def drawn(self, elements: str) -> tuple[int, ...]:
        """The elements of that kind."""
        return {"all": tuple(range(len(self.names))), "generators": self.generators, "swaps": self.swaps}[elements]


@lru_cache(maxsize=16)
def group_of(name: str) -> Group:
    """The group called so; see `GroupWord.group`."""
    first, *rest = [_cyclic(size) if kind == "Z" else _permutations(kind, size) for kind, size in _factors(name)]
    for other in rest:
        left, right = torch.cartesian_prod(torch.arange(len(first.names)), torch.arange(len(other.names))).unbind(1)
        table = first.table[left][:, left] * len(other.names) + other.table[right][:, right]
        names = tuple(f"{a},{b}" for a, b in itertools.product(first.names, other.names))
        generators = (*(g * len(other.names) for g in first.generators), *(g for g in other.generators if g))
        first = Group(names, table, tuple(dict.fromkeys(generators)))
    return first


def _factors(name: str) -> list[tuple[str, int]]:
    return [(part[0], int(part[1:])) for part in name.split("x")]


def _cyclic(size: int) -> Group:
    numbers = torch.arange(size)
    table = (numbers.unsqueeze(1) + numbers) % size
    return Group(tuple(str(i) for i in range(size)), table, tuple(range(min(size, 2))))


def _permutations(kind: str, size: int) -> Group:
    found = [p for p in itertools.permutations(range(size)) if kind == "S" or _even(p)]
    images = torch.tensor(found)
    code = size ** torch.arange(size)
    order = (images * code).sum(1).sort()
    # (a b)(i) = b(a(i)), as a is applied first
    products = images[:, images].permute(1, 0, 2)
    table = order.indices[torch.searchsorted(order.values, (products * code).sum(2))]
    names = tuple(_cycles(p) for p in found)
    index = {p: i for i, p in enumerate(found)}
    moved = [sum(i != image for i, image in enumerate(p)) for p in found]
    if kind == "A":
        generators = tuple(index[_cycle((0, 1, k), size)] for k in range(2, size))
        return Group(names, table, generators)
    generators = (index[_cycle((0, 1), size)], index[_cycle(tuple(range(size)), size)])
    return Group(names, table, tuple(dict.fromkeys(generators)), tuple(i for i, m in enumerate(moved) if m in (0, 2)))


def _even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def _cycle(places: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The permutation of so many places that moves each of `places` to the next."""
    image = list(range(size))
    for place, following in zip(places, (*places[1:], places[0]), strict=True):
        image[place] = following
    return tuple(image)


def _cycles(permutation: tuple[int, ...]) -> str:
    left, text = set(range(len(permutation))), ""
    while left:
        cycle = [min(left)]
        while permutation[cycle[-1]] != cycle[0]:
            cycle.append(permutation[cycle[-1]])
        left -= set(cycle)
        text += f"({''.join(str(i + 1) for i in cycle)})" if len(cycle) > 1 else ""
    return text or "e"


@register(
    "task",
    "counters",
    family="state tracking",
    cases=({"length": 16}, {"counters": 3, "limit": 4, "length": 24, "at_limit": "wrap"}),
)
@dataclass(frozen=True)
class Counters(TokenTask):
    """Counters that go up and down: after each step, the value of the counter that it moved.

    A token is a counter with a direction, all even draws; the counters begin at 0. With at_limit "stay" a step
    beyond the ends is lost, so that the state cannot be told from sums; with "wrap" it can (addition modulo limit).
    `shot` is the steps before.

    counters: that are kept at once.
    limit: values of each, 0 to limit - 1.
    length: steps in the prompt.
    at_limit: "stay", or "wrap" around.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"limit": 4, "length": 16},
        "hard": {"counters": 8, "limit": 16, "length": 256},
    }

    counters: PositiveInt = 1
    limit: Annotated[int, Field(ge=2)] = 8
    length: PositiveInt = 64
    at_limit: Literal["stay", "wrap"] = "stay"

    @property
    def input_size(self) -> int:
        return self.limit + 2 * self.counters

    def symbol(self, token: int) -> str:
        """A value as its number, a step as a+ or a-, of the counter a (then b, ...)."""
        if token < self.limit:
            return str(token)
        counter, down = divmod(token - self.limit, 2)
        return f"{chr(ord('a') + counter) if counter < 26 else f'c{counter}'}{'-' if down else '+'}"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw steps: inputs and targets [batch, length] int64, all scored."""
        shape = (batch, self.length)
        inputs = torch.randint(self.limit, self.input_size, shape, generator=generator, device=device)
        shot = torch.arange(self.length, device=device).expand(batch, -1)
        return Prompt(inputs, self.values(inputs), torch.ones_like(inputs, dtype=torch.bool), shot)

    def values(self, tokens: Tensor) -> Tensor:
        """The value of the counter that each step has moved. tokens: [B, T] int64, the steps -> [B, T] int64."""
        counters, down = ((tokens - self.limit) // 2).clamp(min=0), (tokens - self.limit) % 2
        state, values = tokens.new_zeros(len(tokens), self.counters), []
        for counter, step in zip(counters.split(1, dim=1), (1 - 2 * down).split(1, dim=1), strict=True):
            value = state.gather(1, counter) + step
            value = value.clamp(0, self.limit - 1) if self.at_limit == "stay" else value % self.limit
            state = state.scatter(1, counter, value)
            values.append(value)
        return torch.cat(values, 1)

    def learners(self) -> dict[str, Learner]:
        """`counting`, which makes no error."""
        return {"counting": Program(self.values, self.output_size)}

    def splits(self) -> dict[str, Task]:
        """'train', then 'length=N' with twice and four times the steps."""
        return {"train": self, **{f"length={n}": self.replace(length=n) for n in (2 * self.length, 4 * self.length)}}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the values."""
        return {"accuracy": 1 / self.limit, "cross_entropy": math.log(self.limit)}


@register(
    "task",
    "entity_boxes",
    family="state tracking",
    papers=("2305.02363",),
    cases=({}, {"boxes": 3, "objects": 4, "events": 6, "queries": 1}, {"pours": 1.0, "events": 5}),
)
@dataclass(frozen=True)
class EntityBoxes(TokenTask):
    """What is in a box after objects were moved: the idea of entity tracking (2305.02363) in symbols.

    An event is two tokens: an object and the place it goes to (a box, or `out` of all boxes), or two boxes, when all
    that the first one holds goes to the second. The first events say where each object is; then `events` more: with
    chance `pours` a box that is not empty into another one, else an object to another place, all choices even. Then
    for `queries` boxes, none twice: `?`, the box, its objects in their order, `end`. The objects and `end` are scored,
    each predicted at the token before. The rest, which makes prompts equally long, is `end`. `shot` is the events.
    In the paper the states and the changes are English sentences, and each change may be of several objects.

    boxes: in the world.
    objects: in the world.
    events: changes after the first state is told.
    pours: chance of a change that moves all of a box; without them the last mention of an object tells its place.
    queries: boxes asked for.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"boxes": 3, "objects": 3, "events": 3, "queries": 2},
        "hard": {"boxes": 12, "objects": 24, "events": 64, "queries": 4},
    }

    boxes: Annotated[int, Field(ge=2)] = 7
    objects: PositiveInt = 10
    events: PositiveInt = 12
    pours: Annotated[float, Field(ge=0, le=1)] = 0.5
    queries: PositiveInt = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries > self.boxes:
            raise InputError(f"queries {self.queries} do not fit: no box is asked for twice; at most {self.boxes}")

    # Ids: objects, then boxes, then these three.
    @property
    def out(self) -> int:
        """The place of objects that are in no box."""
        return self.objects + self.boxes

    @property
    def ask(self) -> int:
        """The question mark."""
        return self.out + 1

    @property
    def end(self) -> int:
        """The end of a box's contents."""
        return self.out + 2

    @property
    def input_size(self) -> int:
        return self.end + 1

    @property
    def told(self) -> int:
        """Tokens before the first query."""
        return 2 * (self.objects + self.events)

    def symbol(self, token: int) -> str:
        """Objects as o1, o2, ..., boxes as b1, b2, ..., then out, ? and end."""
        if token < self.objects:
            return f"o{token + 1}"
        return f"b{token - self.objects + 1}" if token < self.out else ("out", "?", "end")[token - self.out]

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs and targets [batch, T] int64 with T = 2 * (objects + events) + 3 * queries + objects."""

        def uniform(*size: int) -> Tensor:
            return torch.rand(batch, *size, generator=generator, device=device)

        place = torch.randint(self.boxes, (batch, self.objects), generator=generator, device=device)
        named = uniform(self.objects).argsort(dim=1)
        told = [torch.stack([named, self.objects + place.gather(1, named)], 2).flatten(1)]
        pour, which = uniform(self.events) < self.pours, uniform(self.events, self.boxes + self.objects)
        # How far to go from the present place, around the circle of all boxes (and, for objects, of out).
        far = torch.stack(
            [
                torch.randint(1, self.boxes + 1, (batch, self.events), generator=generator, device=device),
                torch.randint(1, self.boxes, (batch, self.events), generator=generator, device=device),
            ]
        )
        for event in range(self.events):
            nonempty = torch.zeros(batch, self.boxes + 1, dtype=torch.bool, device=device).scatter_(1, place, True)
            nonempty = nonempty[:, : self.boxes]
            source = (which[:, event, : self.boxes] * nonempty).argmax(1, keepdim=True)
            pours = (pour[:, event] & nonempty.any(1)).unsqueeze(1)
            moved = which[:, event, self.boxes :].argmax(1, keepdim=True)
            to = (place.gather(1, moved) + far[0, :, event : event + 1]) % (self.boxes + 1)
            to = torch.where(pours, (source + far[1, :, event : event + 1]) % self.boxes, to)
            goes = torch.where(pours, place == source, torch.arange(self.objects, device=device) == moved)
            place = torch.where(goes, to, place)
            told.append(torch.cat([torch.where(pours, self.objects + source, moved), self.objects + to], 1))
        asked = uniform(self.boxes).topk(self.queries, dim=1).indices
        answers = self._answers(place, asked)
        inputs = torch.cat([*told, answers], 1)
        targets = torch.cat([inputs[:, 1:], torch.full_like(inputs[:, :1], self.end)], 1)
        # From the box that is asked for to its last object; only the padding and a box's end come before other ends.
        answering = (answers != self.ask) & (answers != self.end)
        scored = torch.cat([torch.zeros_like(inputs[:, : self.told], dtype=torch.bool), answering], 1)
        shot = torch.arange(1, inputs.shape[1] + 1, device=device).div(2, rounding_mode="floor")
        shot = shot.clamp(max=self.objects + self.events).expand_as(inputs)
        return Prompt(inputs, targets, scored, shot)

    def _answers(self, place: Tensor, asked: Tensor) -> Tensor:
        """The queries with their answers. place: [B, objects], asked: [B, queries]; boxes from 0."""
        batch, device = len(place), place.device
        there = place.unsqueeze(1) == asked.unsqueeze(2)  # [B, queries, objects]
        counts = there.sum(2)
        begin = 3 * torch.arange(self.queries, device=device) + counts.cumsum(1) - counts
        answers = torch.full((batch, 3 * self.queries + self.objects + 1), self.end, device=device)
        answers.scatter_(1, begin, self.ask).scatter_(1, begin + 1, self.objects + asked)
        at = begin.unsqueeze(2) + 1 + there.cumsum(2)
        at = torch.where(there, at, answers.shape[1] - 1)  # what is not there is written beyond the last token
        answers.scatter_(1, at.flatten(1), torch.arange(self.objects, device=device).expand_as(at).flatten(1))
        return answers[:, :-1]

    def replies(self, tokens: Tensor) -> Tensor:
        """The next object of the box that was asked for last, or the end, at each place after the events: [B, T] int64.

        tokens: [B, T] int64; places among the events get the end.
        """
        number = torch.arange(self.objects, device=tokens.device)
        place = tokens.new_full((len(tokens), self.objects), self.out)
        things, places = tokens[:, 0 : self.told : 2], tokens[:, 1 : self.told : 2]
        for thing, to in zip(things.split(1, dim=1), places.split(1, dim=1), strict=True):
            place = torch.where((number == thing) | (place == thing), to, place)
        tail = tokens[:, self.told :]
        here = torch.arange(tail.shape[1], device=tokens.device)
        box = tail.gather(1, torch.where((tail >= self.objects) & (tail < self.out), here, 0).cummax(1).values)
        shown = torch.where(tail < self.objects, tail, -1)  # objects come in their order
        left = (place.unsqueeze(1) == box.unsqueeze(2)) & (number > shown.unsqueeze(2))
        answers = torch.where(left.any(2), left.int().argmax(2), self.end)
        return torch.cat([torch.full_like(tokens[:, : self.told], self.end), answers], 1)

    def learners(self) -> dict[str, Learner]:
        """`replay`, which makes no error."""
        return {"replay": Program(self.replies, self.output_size)}

    def splits(self) -> dict[str, Task]:
        """'train'; 'events=N' with twice and four times the events; 'pours=0' and 'pours=1', none and only such."""
        found: dict[str, Task] = {"train": self}
        for events in (2 * self.events, 4 * self.events):
            found[f"events={events}"] = self.replace(events=events)
        return {**found, "pours=0": self.replace(pours=0.0), "pours=1": self.replace(pours=1.0)}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the objects and the end."""
        return {"accuracy": 1 / (self.objects + 1), "cross_entropy": math.log(self.objects + 1)}
