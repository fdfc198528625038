"""What RULER's tasks share: noise, lists of answers, the room that is left for a text."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from contextlab.tasks.text.codec import Codec
from contextlab.tasks.text.corpus import Corpus
from contextlab.tasks.text.page import Page, Pieces, cat, spaced

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@lru_cache(maxsize=8)
def noise(codec: Codec, length: int) -> Corpus:
    """A document of the noise sentences, one line after another, of more than `length` tokens."""
    line = codec.encode(NOISE)
    count = length // len(line) + 2
    lines = torch.arange(count) * len(line)
    tokens = torch.tensor(line * count, dtype=torch.uint8 if codec.is_bytes else torch.int32)
    return Corpus(["noise"], tokens, torch.tensor([0, len(tokens)]), lines)


def one_by_one(page: Page, answers: list[Pieces], between: str) -> list[tuple[Pieces, bool]]:
    """Answers one after another, with what stands between them, which is not scored."""
    found: list[tuple[Pieces, bool]] = []
    for i, pieces in enumerate(answers):
        if i and between:
            found.append((page.text(between), False))
        found += spaced(page, pieces)
    return found


def room(length: int, parts: list[Pieces], answer: list[tuple[Pieces, bool]]) -> Tensor:
    """[B, 1], the tokens that are left for a list beside these."""
    return length + 1 - cat(*parts, *(pieces for pieces, _ in answer)).size.sum(1, keepdim=True)
