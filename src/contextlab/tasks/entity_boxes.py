"""Entities in boxes that are moved about: what is in a box now?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.automata import Program
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask


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
        """Guessing uniformly among the objects and the end."""
        return {"accuracy": 1 / (self.objects + 1), "cross_entropy": math.log(self.objects + 1)}
