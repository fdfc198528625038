"""Interactive maps in a page: a prompt's tokens; point at one, and those that it looks at are coloured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from torch import Tensor

from contextlab.inspect.viewing import Viewed, ViewedPrompt, pick
from contextlab.report.packing import Packed, pack
from contextlab.report.page import template

MOST_BYTES = 150_000
"""That the maps of a page may take, in characters, so that it stays small."""
MOST_TOKENS = 256
"""Of a prompt that are shown; of longer ones the first are one."""
SIZES = ((3, 48), (2, 40), (1, 40), (1, 24), (1, 12))
"""(prompts, tokens of each that can be asked), the largest that fits is taken."""


def looked_maps(views: Sequence[Viewed]) -> Markup:
    """The part of a page that shows them, scripts included. Models that do not fit are left out and named."""
    kept = list(views)
    packed = _packed(kept, *SIZES[-1])
    while len(packed.text) > MOST_BYTES and len(kept) > 1:
        kept.pop()
        packed = _packed(kept, *SIZES[-1])
    tried = (_packed(kept, *size) for size in SIZES[:-1])
    packed = next((each for each in tried if len(each.text) <= MOST_BYTES), packed)
    left_out = [each.title for each in views[len(kept) :]]
    return Markup(template("maps.html.j2").render(piece=packed, left_out=left_out))


def _packed(views: Sequence[Viewed], prompts: int, rows: int) -> Packed:
    return pack(json.dumps([_plain(each, prompts, rows) for each in views], separators=(",", ":")))


def _plain(viewed: Viewed, prompts: int, rows: int) -> dict[str, Any]:
    """As the page's script reads it; shares are thousandths, and of each row what follows the last one is left out."""
    shown = viewed.prompts[:prompts]
    asked = [pick(prompt.rows, list(prompt.wanted), rows) for prompt in shown]
    hidden = [max(0, len(prompt.words) - MOST_TOKENS) for prompt in shown]
    return {
        "title": viewed.title,
        "prompts": [_prompt(*each) for each in zip(shown, asked, hidden, strict=True)],
        "parts": [
            {
                "name": part.name,
                "heads": part.heads,
                "maps": [
                    [_rows(head, prompt, places, first) for head in part.maps[number]]
                    for number, (prompt, places, first) in enumerate(zip(shown, asked, hidden, strict=True))
                ],
            }
            for part in viewed.parts
        ],
    }


def _prompt(prompt: ViewedPrompt, asked: Sequence[int], hidden: int) -> dict[str, Any]:
    values = prompt.values[hidden:]
    return {
        "words": prompt.words[hidden:],
        "values": values if any(values) else [],
        "hidden": hidden,
        "rows": [place for place in asked if place >= hidden],
        "wanted": {str(place): list(each) for place, each in prompt.wanted.items() if place >= hidden},
    }


def _rows(head: Tensor, prompt: ViewedPrompt, asked: Sequence[int], hidden: int) -> list[list[int]]:
    """Of each place that is asked where it looks, in thousandths; those that are hidden come first, as one."""
    found = []
    for place in asked:
        if place < hidden:
            continue
        row = head[prompt.rows.index(place)]
        shares = [*([row[:hidden].abs().sum().item()] if hidden else []), *row[hidden:].tolist()]
        whole = [round(1000 * share) for share in shares]
        while whole and not whole[-1]:
            whole.pop()
        found.append(whole)
    return found
