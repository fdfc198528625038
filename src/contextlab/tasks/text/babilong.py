"""Facts about a small world, hidden in a long text: BABILong's first tasks."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError, at_most
from contextlab.prompt import Task
from contextlab.registry import register
from contextlab.tasks.base import check_options
from contextlab.tasks.text.babilong_gifts import ask_gift, read_gift
from contextlab.tasks.text.babilong_relations import read_relations, relations
from contextlab.tasks.text.babilong_world import (
    ACTORS,
    DROP,
    DROPS,
    GIVE,
    GIVES,
    GIVING,
    MOVE,
    MOVES,
    OBJECTLESS,
    OBJECTS,
    PLACES,
    TAKE,
    TAKES,
    Told,
    World,
    simulate,
)
from contextlab.tasks.text.base import FilledTask
from contextlab.tasks.text.corpus import PYTHON, Part
from contextlab.tasks.text.page import Page, Pieces, Story, cat, interleave, spaced

Name = Literal["qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8"]
NAMES: tuple[str, ...] = get_args(Name)
FACTS, RELATIONS = 6, 2
"""Facts of a story where the user does not say: bAbI has two of places in qa4."""
LISTS = tuple(
    ",".join(name for name, held in zip(OBJECTS, each, strict=True) if held) or "nothing"
    for each in product((0, 1), repeat=len(OBJECTS))
)
ANSWERS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": (*ACTORS, *OBJECTS),
    "qa6": ("no", "yes"),
    "qa7": ("none", "one", "two", "three"),
    "qa8": LISTS,
}


@register(
    "task",
    "babilong",
    family="text",
    papers=("2406.10149", "1502.05698"),
    cases=({"length": 600}, {"task": "qa3", "length": 600}, {"task": "qa4", "length": 600}, {"task": "qa5"}),
)
@dataclass(frozen=True)
class FactsInText(FilledTask):
    """BABILong-style facts in filler: who went where and carried what, told between the lines of an unrelated text.

    qa1: where is a person? The last move tells. qa2: where is an object? Who took it, and where that person went,
    tell. qa3: where was an object before the place it is at now?
    qa4: places that are north, south, east or west of each other; what is north of one, or what is it north of? The
        same words in another order have another answer.
    qa5: who gave what to whom? The last fact that fits tells.
    qa6: is a person in a place? Yes and no are equally likely. qa7, qa8: how many objects, and which, does a person
        carry? Answers are none to three; "nothing", or the objects in alphabetical order with commas between them.

    People, places, objects and the forms of questions are those of bAbI, and facts stand in their order at random
    places of the text. What differs: stories are simulated here and not read from bAbI's files. Where there are
    objects, each fact moves a person with probability 1/3, and else takes or drops one where that can be done (an
    object nobody has touched yet lies wherever it is taken first), after someone has moved, taken something and moved
    on. In qa5, qa7 and qa8 half of what would be dropped is given to someone who is there or has not been seen yet; qa5
    begins with a gift. In qa4 places are a chain of steps in two directions, told in any order, and the question is
    about a place between two steps of the same direction; with two facts that is bAbI's. The text around the facts is
    `corpus` in place of books, and facts stand at beginnings of its lines; there is one question, without instructions.

    task: qa1 to qa8.
    facts: how many the story has, at least 3 (2 to 5 in qa4); null for 6 (2 in qa4).
    length: tokens in the prompt.
    corpus: "python", the sources of the standard library on this machine, or the path of a text file or a folder.
    part: documents to draw from, "train" or "test".
    tokenizer: null for bytes, a folder with tokenizer.json, a Hugging Face hub name, or an object (encode, decode).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"facts": 3, "length": 512},
        "hard": {"task": "qa3", "facts": 20, "length": 8192},
        **{name: {"task": name, "length": 2048} for name in NAMES},
    }

    task: Name = "qa1"
    facts: Annotated[int, Field(ge=2)] | None = None
    length: PositiveInt = 1024
    corpus: str = PYTHON
    part: Part = "train"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        check_options(self)
        least = RELATIONS if self.task == "qa4" else 3
        if self.count < least:
            raise InputError(f"facts {self.count} make no story of {self.task}; expected at least {least}")
        if self.task == "qa4" and self.count >= len(PLACES):
            raise InputError(
                f"facts {self.count}: qa4 tells of {len(PLACES)} places; expected at most {len(PLACES) - 1}"
            )
        if 4 * self.count > self.length:  # the rest is found by writing the story, which takes as long as it is
            most = self.length // 4
            raise InputError(
                f"facts {self.count} do not fit: each has 4 tokens or more, and length is {self.length}; "
                + at_most(most if most >= least else 0, "use a greater length")
            )
        super().__post_init__()

    @property
    def count(self) -> int:
        """Facts of a story."""
        if self.facts is not None:
            return self.facts
        return RELATIONS if self.task == "qa4" else FACTS

    def alphabet(self) -> str:
        """Small letters: answers are words; names of people begin with others, lists have commas."""
        return string.ascii_lowercase + {"qa5": string.ascii_uppercase, "qa8": ","}.get(self.task, "")

    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw the story, then one of the questions that it answers."""
        told = (
            relations(page, self.count, batch, generator)
            if self.task == "qa4"
            else self._events(page, batch, generator)
        )
        lines, question, answer, fact = told
        facts = [Pieces(lines.start[:, i : i + 4], lines.size[:, i : i + 4]) for i in range(0, 4 * self.count, 4)]
        the = " the" if ANSWERS[self.task] == PLACES else ""
        after = cat(page.text("\nQuestion:"), question, page.text(f"\nAnswer:{the}"))
        spelled = spaced(page, page.text(*(f" {each}" for each in ANSWERS[self.task])).take(answer))
        depths = torch.rand(batch, self.count, generator=generator, device=page.device).sort(1).values
        parts, places = self.fill(page, generator, page.text(""), facts, depths, after, spelled)
        return Story(parts, spelled, places[fact], _references(self.task).to(page.device)[answer.squeeze(1)])

    def _events(self, page: Page, batch: int, generator: torch.Generator) -> Told:
        """All other tasks: what people did, one fact after another."""
        device = page.device
        world = simulate(self.task, self.count, batch, generator, device)
        question, answer, fact = self._ask(page, world, generator)
        verbs = page.text(*(f" {verb} the" for verb in (*MOVES, *TAKES, *DROPS, *GIVES)))
        wording = 4 * world.act + torch.randint(4, world.act.shape, generator=generator, device=device)
        ends = page.text(".\n", *(f" to {each}.\n" for each in ACTORS))
        end = torch.zeros_like(wording)
        if self.task in GIVING:
            give = torch.randint(len(GIVES), world.act.shape, generator=generator, device=device)
            wording = torch.where(world.act == GIVE, 4 * GIVE + give, wording)
            end = torch.where(world.act == GIVE, world.other + 1, 0)
        nouns = page.text(*(f" {each}" for each in (*PLACES, *OBJECTS)))
        lines = interleave(
            page.text(*ACTORS).take(world.actor), verbs.take(wording), nouns.take(world.noun), ends.take(end)
        )
        return Told(lines, question, answer, fact)

    def _ask(self, page: Page, world: World, generator: torch.Generator) -> tuple[Pieces, Tensor, Tensor]:
        """The question, its answer [B, 1] and the fact that settled it [B], of a story that has been told."""
        device, batch = page.device, len(world.at)

        def one(known: Tensor) -> Tensor:
            """One of those that are known, evenly, [B, 1]."""
            chance = torch.rand(known.shape, generator=generator, device=device)
            return torch.where(known, chance, -1.0).argmax(1, keepdim=True)

        actors, places, objects = (page.text(*(f" {each}" for each in names)) for names in (ACTORS, PLACES, OBJECTS))
        mark = page.text("?")
        if self.task == "qa5":
            return ask_gift(page, world, generator, one)
        if self.task in ("qa2", "qa3"):
            asked = one((world.lies if self.task == "qa2" else world.before) >= 0)
            now, fact = world.lies.gather(1, asked), world.settled.gather(1, asked).squeeze(1)
            if self.task == "qa2":
                return cat(page.text(" Where is the"), objects.take(asked), mark), now, fact
            was = cat(
                page.text(" Where was the"), objects.take(asked), page.text(" before the"), places.take(now), mark
            )
            return was, world.before.gather(1, asked), fact
        asked = one((world.at if self.task in OBJECTLESS else world.touched) >= 0)
        who = actors.take(asked)
        if self.task in ("qa7", "qa8"):
            held, fact = world.holder == asked, world.touched.gather(1, asked).squeeze(1)
            if self.task == "qa7":
                question = cat(page.text(" How many objects is"), who, page.text(" carrying?"))
                return question, held.sum(1, keepdim=True), fact
            powers = 2 ** torch.arange(len(OBJECTS) - 1, -1, -1, device=device)
            question = cat(page.text(" What is"), who, page.text(" carrying?"))
            return question, (held * powers).sum(1, keepdim=True), fact
        now, fact = world.at.gather(1, asked), world.moved.gather(1, asked).squeeze(1)
        if self.task == "qa1":
            return cat(page.text(" Where is"), who, mark), now, fact
        yes = torch.randint(2, (batch, 1), generator=generator, device=device)
        other = torch.randint(1, len(PLACES), (batch, 1), generator=generator, device=device)
        place = (now + (1 - yes) * other) % len(PLACES)
        return cat(page.text(" Is"), who, page.text(" in the"), places.take(place), mark), yes, fact

    def read(self, text: str) -> list[str]:
        """The answer, from the story told again."""
        asked = text[text.rindex("\nQuestion: ") + 11 : text.rindex("\nAnswer:")]
        if self.task == "qa4":
            return read_relations(text, asked)
        verbs = {verb: kind for kind, names in enumerate((MOVES, TAKES, DROPS, GIVES)) for verb in names}
        people, things = "|".join(ACTORS), "|".join(OBJECTS)
        pattern = rf"({people}) ({'|'.join(verbs)}) the ({'|'.join(PLACES)}|{things})(?: to ({people}))?\.\n"
        where: dict[str, list[str]] = {}  # the places of everyone and everything, in turn
        held: dict[str, str] = {}
        gifts: list[dict[str, str]] = []
        for who, verb, noun, other in re.findall(pattern, text):
            if verbs[verb] == MOVE:
                where.setdefault(who, []).append(noun)
            elif verbs[verb] == TAKE:
                held[noun] = who
            elif verbs[verb] == DROP:
                del held[noun]
            else:
                held[noun] = other
                where.setdefault(other, where[who][-1:])
                gifts.append({"giver": who, "thing": noun, "other": other})
            for thing, owner in held.items():
                if where[owner][-1:] != where.get(thing, [])[-1:]:
                    where.setdefault(thing, []).append(where[owner][-1])
        if self.task == "qa5":
            return read_gift(gifts, asked)
        subject = next(word for word in re.findall(r"\w+", asked) if word in (*ACTORS, *OBJECTS))
        if self.task == "qa6":
            return [" yes" if asked.endswith(f" {where[subject][-1]}?") else " no"]
        if self.task in ("qa7", "qa8"):
            carried = sorted(thing for thing, owner in held.items() if owner == subject)
            return [f" {ANSWERS['qa7'][len(carried)]}" if self.task == "qa7" else f" {','.join(carried) or 'nothing'}"]
        return [f" {where[subject][-2 if self.task == 'qa3' else -1]}"]

    def splits(self) -> dict[str, Task]:
        """'train', held-out documents, these at twice and four times the length, and with twice the facts."""
        held_out = self.replace(part="test")
        found: dict[str, Task] = {"train": self, "documents=test": held_out}
        for k in (2, 4):
            found[f"length={k * self.length}"] = held_out.replace(length=k * self.length)
        more = min(2 * self.count, len(PLACES) - 1) if self.task == "qa4" else 2 * self.count
        if more > self.count:
            found[f"facts={more}"] = held_out.replace(facts=more, length=2 * self.length)
        return found


@lru_cache
def _references(task: str) -> Tensor:
    """Of each answer what has to be in a text that gives it, [answers, K, L], ASCII codes filled up with zeros."""
    words = [each.split(",") for each in ANSWERS[task]]
    width, most = max(len(word) for row in words for word in row), max(map(len, words))
    return torch.tensor(
        [[list(word.ljust(width, "\0").encode()) for word in row + [""] * (most - len(row))] for row in words]
    )
