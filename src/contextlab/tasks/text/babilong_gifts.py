"""BABILong's fifth task: who gave what to whom?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contextlab.tasks.text.babilong_world import ACTORS, GIVE, OBJECTS, PLACES, World
from contextlab.tasks.text.page import Page, Pieces, cat

GIFTS = (
    (" What did", "giver", " give to", "other", "?", "thing"),
    (" Who gave the", "thing", " to", "other", "?", "giver"),
    (" Who gave the", "thing", "", "", "?", "giver"),
    (" Who received the", "thing", "", "", "?", "other"),
    (" Who did", "giver", " give the", "thing", " to?", "other"),
)
"""The questions of qa5, around two names, and what answers them."""


def ask_gift(
    page: Page, world: World, generator: torch.Generator, one: Callable[[Tensor], Tensor]
) -> tuple[Pieces, Tensor, Tensor]:
    """qa5: a form of question, then names that it has an answer for, all evenly; the last fact that fits answers.

    one: draws one of those known, [B, n] bool to [B, 1]. Returns the question, its answer [B, 1], its fact [B].
    """
    device, (batch, n) = page.device, world.act.shape
    people, things = len(ACTORS), len(OBJECTS)
    names = {"giver": world.actor, "thing": people + world.noun - len(PLACES), "other": world.other}
    none = people + things
    form = torch.randint(len(GIFTS), (batch, 1), generator=generator, device=device)
    slots = []  # [forms, B, n]: the numbers of the first name, of the second, and of the answer
    for at in (1, 3, 5):
        slots.append(torch.stack([names.get(each[at], torch.full_like(world.act, none)) for each in GIFTS]))
    rows = torch.arange(batch, device=device)
    first, second, answer = (each[form.squeeze(1), rows] for each in slots)
    key = (none + 1) * first + second
    steps = torch.where(world.act == GIVE, torch.arange(n, device=device), -1)
    last = torch.full((batch, (none + 1) ** 2), -1, device=device)
    last.scatter_reduce_(1, torch.where(world.act == GIVE, key, 0), steps, "amax")
    fact = last.gather(1, one(last >= 0))
    words = page.text(*(f" {each}" for each in (*ACTORS, *OBJECTS)), "")
    pieces = [page.text(*(each[at] for each in GIFTS)).take(form) for at in (0, 2, 4)]
    question = cat(
        pieces[0], words.take(first.gather(1, fact)), pieces[1], words.take(second.gather(1, fact)), pieces[2]
    )
    return question, answer.gather(1, fact), fact.squeeze(1)


def read_gift(gifts: list[dict[str, str]], asked: str) -> list[str]:
    """The last gift that fits the question."""
    for start, first, middle, second, end, answer in GIFTS:
        for gift in reversed(gifts):
            names = [f" {gift[each]}" if each else "" for each in (first, second)]
            if f" {asked}" == f"{start}{names[0]}{middle}{names[1]}{end}":
                return [f" {gift[answer]}"]
    return []
