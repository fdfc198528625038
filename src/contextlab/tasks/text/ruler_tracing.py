"""RULER's multi-hop tracing: a chain of variables that is hidden in noise."""

from __future__ import annotations

import itertools
import re
import string
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.tasks.text.page import SPACE, Page, Pieces, Story, cat, digits, distinct, letters
from contextlab.tasks.text.ruler_parts import NOISE, one_by_one, room

if TYPE_CHECKING:
    from contextlab.tasks.text.ruler import Ruler

HOPS, LINE = 4, 5
"""Of variable tracking: assignments after the first; letters of a name."""


def variables(task: Ruler, page: Page, batch: int, generator: torch.Generator) -> Story:
    """The chain of assignments in noise, and the question for its variables."""
    device = page.device

    def chain(width: int) -> tuple[Tensor, Pieces, Pieces, list[Pieces]]:
        """Codes and pieces of five names (a space before), of the value, and the assignments."""
        number = distinct(batch, HOPS + 1, 26**width, generator, device)
        codes = letters(number, width, string.ascii_uppercase)
        names = page.spell(F.pad(codes, (1, 0), value=SPACE))
        value = torch.randint(10**4, 10**5 - 1, (batch, 1), generator=generator, device=device)
        spelled = page.spell(F.pad(digits(value, 5), (1, 0), value=SPACE))
        each = [Pieces(names.start[:, i : i + 1], names.size[:, i : i + 1]) for i in range(HOPS + 1)]
        told = [cat(page.text("VAR"), each[0], page.text(" ="), spelled, page.text("\n"))]
        for before, name in itertools.pairwise(each):
            told.append(cat(page.text("VAR"), name, page.text(" = VAR"), before, page.text("\n")))
        return codes, names, spelled, told

    def question(value: Pieces) -> Pieces:
        return cat(
            page.text("\nQuestion: Find all variables that are assigned the value"),
            value,
            page.text(f" in the text above. Answer: In the text above, {HOPS + 1} variables have the value"),
            value,
            page.text(", they are:"),
        )

    def answers(names: Pieces) -> list[tuple[Pieces, bool]]:
        return one_by_one(page, [names.take(torch.full((batch, 1), i, device=device)) for i in range(HOPS + 1)], "")

    head = page.text("Memorize the chain of variable assignments that is hidden in the text below.\n")
    before = head
    if task.example:
        _, names, value, told = chain(3)
        shown = [piece for i, line in enumerate(told) for piece in ([page.text(NOISE)] if i % 2 else []) + [line]]
        solved = [piece for piece, _ in answers(names)]
        before = cat(head, *shown, question(value), *solved, page.text("\n"), head)
    codes, names, value, told = chain(LINE)
    answer = answers(names)
    free = room(task.length, [before, *told, question(value)], answer)
    line = len(page.codec.encode(NOISE))
    if (lines := int(free.min()) // line) > HOPS:  # as published, noise between any two assignments
        drawn = torch.rand(batch, lines, generator=generator, device=device)
        depths = (drawn.topk(HOPS + 1, 1).indices.sort(1).values + 0.5) * line / free
    else:
        depths = torch.rand(batch, HOPS + 1, generator=generator, device=device).sort(1).values
    parts, places = task.fill(page, generator, before, told, depths, question(value), answer)
    return Story(parts, answer, places[:1].expand(batch), codes)


def read_variables(text: str) -> list[str]:
    """The variables that have the value which a prompt asks for, in its order."""
    *_, asked = re.finditer(r"variables have the value (\d+), they are: ?", text)
    text = text[text.rindex("Memorize the chain") :]
    values: dict[str, str] = {}
    for name, number, other in re.findall(r"VAR ([A-Z]+) = (?:(\d+)|VAR ([A-Z]+))\n", text):
        values[name] = number or values[other]
    return [f" {name}" for name, value in values.items() if value == asked[1]]
