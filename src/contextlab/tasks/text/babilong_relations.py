"""BABILong's fourth task: which place is north, south, east or west of another?"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from contextlab.tasks.text.babilong_world import PLACES, Told
from contextlab.tasks.text.page import Page, cat, interleave

DIRECTIONS = ("north", "south", "east", "west")
"""Opposite ones side by side."""


def read_relations(text: str, asked: str) -> list[str]:
    """The place in a direction of another, from either way to say it."""
    opposite = dict(zip(DIRECTIONS, ("south", "north", "west", "east"), strict=True))
    beside: dict[tuple[str, str], str] = {}  # the place in a direction of a place
    ways, places = "|".join(DIRECTIONS), "|".join(PLACES)
    for first, way, second in re.findall(rf"The ({places}) is ({ways}) of the ({places})\.\n", text):
        beside[way, second] = first
        beside[opposite[way], first] = second
    if found := re.fullmatch(rf"What is ({ways}) of the ({places})\?", asked):
        return [f" {beside[found[1], found[2]]}"]
    found = re.fullmatch(rf"What is the ({places}) ({ways}) of\?", asked)
    return [f" {beside[opposite[found[2]], found[1]]}"] if found else []


def relations(page: Page, count: int, batch: int, generator: torch.Generator) -> Told:
    """qa4: place i + 1 of a chain is in direction i of place i, a coin's throw for each of two directions."""
    device, n = page.device, count

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (batch, *shape), generator=generator, device=device)

    place = torch.rand(batch, len(PLACES), generator=generator, device=device).argsort(1)[:, : n + 1]
    turn, sense, middle = draw(2, n), draw(2, 2), draw(n - 1, 1)
    turn.scatter_(1, middle + 1, turn.gather(1, middle))  # the steps before and after the place that is asked for
    direction = 2 * turn + sense.gather(1, turn)
    order = torch.rand(batch, n, generator=generator, device=device).argsort(1)
    back = draw(2, n)  # a step is told of its end, or of its beginning, which is in the opposite direction of it
    first, second = place.gather(1, order + 1 - back), place.gather(1, order + back)
    names = page.text(*(f" {each}" for each in PLACES))
    ways = page.text(*(f" is {each} of the" for each in DIRECTIONS))
    lines = interleave(
        page.text(*(f"The {each}" for each in PLACES)).take(first),
        ways.take(direction.gather(1, order) ^ back),
        names.take(second),
        page.text(".\n"),
    )
    on = draw(2, 1)  # the answer is the next of the chain, or the one before
    way = direction.gather(1, middle) ^ 1 ^ on  # of the answer, from the place
    asked, answer = place.gather(1, middle + 1), place.gather(1, middle + 2 * on)
    turned = draw(2, 1)  # "what is north of it", or "what is it south of"
    question = cat(
        page.text(*(f" What is {each} of the" for each in DIRECTIONS), *[" What is the"] * 4).take(way + 4 * turned),
        names.take(asked),
        page.text(*["?"] * 4, *(f" {each} of?" for each in DIRECTIONS)).take((way ^ turned) + 4 * turned),
    )
    return Told(lines, question, answer, (order == middle + on).int().argmax(1))
