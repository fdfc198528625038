"""RULER's retrieval: needles in noise, in text, or among other needles."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.tasks.text.page import SPACE, Page, Pieces, Story, cat, digits, distinct, interleave, uuids
from contextlab.tasks.text.ruler_parts import one_by_one, room
from contextlab.tasks.text.wordlist import adjectives, nouns

if TYPE_CHECKING:
    from contextlab.tasks.text.ruler import Ruler


class Needles(NamedTuple):
    """A task of needles: what surrounds them, what keys and values are, how many of each, how many are asked for."""

    haystack: Literal["noise", "text", "needles"] = "text"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    key_count: int = 1
    value_count: int = 1
    asked: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(values="uuids"),
    "niah_multikey_1": Needles(key_count=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", "uuids", "uuids"),
    "niah_multivalue": Needles(value_count=4),
    "niah_multiquery": Needles(key_count=4, asked=4),
}
DEPTHS = 40
"""Depths in the text at which needles stand, evenly from its beginning to its end."""


def needles(task: Ruler, page: Page, batch: int, generator: torch.Generator, kind: Needles) -> Story:
    """The needles, what hides them, and the question for some of them."""
    device = page.device
    one_answer = kind.asked * kind.value_count == 1
    noun, be = (kind.values[:-1], "is") if one_answer else (kind.values, "are")
    head = page.text(
        f"{'A' if one_answer else 'Some'} special magic {noun} {be} hidden in the text below. Memorize "
        f"{'it' if one_answer else 'them'}, because you will be asked about the {noun} afterwards.\n"
    )
    lines = kind.key_count * kind.value_count
    if kind.haystack == "needles":  # as many as can be, of which some are left out again
        shortest = 2 * len(page.codec.encode("One of the special magic"))
        lines = max(2, task.length // shortest)
    count = lines // kind.value_count
    asked = torch.rand(batch, kind.key_count, generator=generator, device=device).topk(kind.asked, 1).indices
    first, second = adjectives(task.part), nouns(task.part)
    if kind.keys == "uuids":
        codes = F.pad(uuids((batch, count), generator, device), (1, 0), value=SPACE)
        keys = interleave(page.spell(codes), page.text(""))
    else:
        drawn = distinct(batch, kind.key_count, len(first) * len(second), generator, device)
        if count > kind.key_count:  # others may be alike, but not like the one that is asked for
            others = torch.randint(len(first) * len(second), (batch, count), generator=generator, device=device)
            while (same := others == drawn).any():
                others[same] = torch.randint(
                    len(first) * len(second), (int(same.sum()),), generator=generator, device=device
                )
            others[:, :1] = drawn
            drawn = others
        one = page.text(*(f" {each}" for each in first)).take(drawn // len(second))
        keys = interleave(one, page.text(*(f"-{each}" for each in second)).take(drawn % len(second)))
    if kind.values == "uuids":
        codes = uuids((batch, lines), generator, device)
    else:
        number = torch.randint(10**6, 10**7, (batch, lines), generator=generator, device=device)
        codes = digits(number, 7)
    values = page.spell(F.pad(codes, (1, 0), value=SPACE))
    # line i is about key i // value_count, with value i
    owner = 2 * (torch.arange(lines, device=device) // kind.value_count)
    begin = page.text(f"One of the special magic {kind.values} for")
    ones, twos = keys.take(owner.expand(batch, -1)), keys.take(owner.expand(batch, -1) + 1)
    text = interleave(begin, ones, twos, page.text(" is:"), values, page.text(".\n"))
    order = torch.rand(batch, lines, generator=generator, device=device).argsort(1)  # of the lines in the text
    place = order.argsort(1)
    of_asked = asked.unsqueeze(2) * kind.value_count + torch.arange(kind.value_count, device=device)
    rising = place.gather(1, of_asked.flatten(1)).view(of_asked.shape).argsort(2)
    answers = of_asked.gather(2, rising).flatten(1)  # key by key as asked, the values as the text has them

    query: list[Pieces] = []
    for i in range(kind.asked):
        if i:
            query.append(page.text("," if i < kind.asked - 1 else ", and"))
        query.append(keys.take(2 * asked[:, i : i + 1] + torch.arange(2, device=device)))
    question = page.text(f"\nWhat {be}{'' if one_answer else ' all'} the special magic {noun} for")
    again = page.text(f" mentioned in the text above? The special magic {noun} for")
    after = cat(question, *query, again, *query, page.text(f" mentioned in the text above {be}"))
    answer = one_by_one(page, [values.take(answers[:, i : i + 1]) for i in range(answers.shape[1])], ",")
    references = codes.gather(1, answers.unsqueeze(2).expand(-1, -1, codes.shape[2]))
    width = 6 * torch.arange(lines, device=device)
    if kind.haystack == "needles":
        # Line 0 is asked for. Others follow it while they fit, and all that fit are shuffled.
        size = text.size.view(batch, lines, 6).sum(2)
        kept = size.cumsum(1) <= room(task.length, [head, after], answer)
        if not kept[:, 0].all():
            raise InputError(f"length {task.length} is too short for a needle and the question; use twice the length")
        ranked = torch.where(kept, place, lines).argsort(1)
        every = (6 * ranked.unsqueeze(2) + torch.arange(6, device=device)).flatten(1)
        shown = kept.gather(1, ranked).repeat_interleave(6, 1)
        fact = head.start.shape[1] + 6 * (ranked == 0).int().argmax(1)
        return Story([head, text.take(every).where(shown), after], answer, fact, references)
    facts = [text.take(6 * order[:, i : i + 1] + torch.arange(6, device=device)) for i in range(len(width))]
    if kind.haystack == "noise":
        depths = torch.rand(batch, lines, generator=generator, device=device).sort(1).values
    else:
        chosen = torch.rand(batch, DEPTHS, generator=generator, device=device).topk(lines, 1).indices.sort(1).values
        depths = (100 * chosen / (DEPTHS - 1)).round() / 100
    parts, places = task.fill(page, generator, head, facts, depths, after, answer)
    return Story(parts, answer, places[place.gather(1, answers[:, 0:1])].squeeze(1), references)


def read_needles(text: str) -> list[str]:
    """The values of the keys that a prompt asks for, in its order."""
    asked = re.search(r"The special magic \w+ for ([^?]+) mentioned in the text above (?:is|are) ?$", text)
    if not asked:
        return []
    keys = re.split(r", and |, ", asked[1])
    return [f" {each}" for key in keys for each in re.findall(rf"special magic \w+ for {key} is: (\S+)\.\n", text)]
