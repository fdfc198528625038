"""RULER's aggregation: the most common words of a list, the most frequent ones of a coded text."""

from __future__ import annotations

import re
import string
from bisect import bisect_right
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.tasks.text.corpus import Part
from contextlab.tasks.text.page import SPACE, Page, Pieces, Story, cat, distinct, interleave, letters, spaced
from contextlab.tasks.text.ruler_parts import one_by_one
from contextlab.tasks.text.wordlist import adjectives, nouns

if TYPE_CHECKING:
    from contextlab.tasks.text.ruler import Ruler

COMMON = 10
"""Words that are asked for in common words extraction."""
CODED, ALPHA = 6, 2.0
"""Of frequent words extraction: letters of a coded word, exponent of the word frequencies."""
BYTES = 4
"""Bytes that count for one token where a published rule depends on the length."""


def common_words(task: Ruler, page: Page, batch: int, generator: torch.Generator) -> Story:
    """The numbered list, and the question for the words that it repeats most."""
    device = page.device
    table, spellings = _words(task.part)
    words = page.text(*table)
    numbers = page.text("1", *(f" {i + 2}" for i in range(max(400, task.length))))
    ask = (
        f"\nQuestion: What are the {COMMON} most common words in the list above? Answer: The {COMMON} words that "
        "appear most often in the list are:"
    )
    head = page.text("Below is a numbered list of words, of which some appear more often than others.\n")
    marks = [page.text(f" {i + 1}.") for i in range(COMMON)]

    def listed(count: int, often: int, seldom: int, room: Tensor | None) -> tuple[Pieces, Tensor, Tensor]:
        """The list [B, 3 n], its common words [B, 10] in order of first place, and the first of those."""
        if count > len(table):
            raise InputError(f"cwe: length {task.length} asks for {count} words, and there are {len(table)}")
        drawn = torch.rand(batch, len(table), generator=generator, device=device).topk(count, 1).indices
        common = torch.arange(COMMON, device=device)
        each = torch.cat([common.repeat(often), torch.arange(COMMON, count, device=device).repeat(seldom)])
        size = words.size[0, drawn] + int(numbers.size.max()) + 1
        kept = torch.ones_like(drawn, dtype=torch.bool)
        if room is not None:
            times = torch.where(torch.arange(count, device=device) < COMMON, often, seldom)
            kept = (size * times).cumsum(1) <= room
            if not kept[:, :COMMON].all():
                need = task.length + int(((size * times)[:, :COMMON].sum(1) - room[:, 0]).max())
                raise InputError(f"length {task.length} is too short for cwe: use {need + 64} or more")
        order = torch.rand(batch, len(each), generator=generator, device=device)
        order = torch.where(kept[:, each], order, 2.0).argsort(1)
        shuffled = each[order]
        shown = kept.gather(1, shuffled)
        number = torch.arange(len(each), device=device).expand(batch, -1)
        entries = interleave(numbers.take(number), page.text("."), words.take(drawn.gather(1, shuffled)))
        places = torch.where(shuffled.unsqueeze(1) == common.view(1, -1, 1), number.unsqueeze(1), len(each))
        begin = places.amin(2)
        rank = begin.argsort(1)
        return entries.where(shown.repeat_interleave(3, 1)), drawn.gather(1, rank), begin.amin(1)

    def solved(common: Tensor) -> list[tuple[Pieces, bool]]:
        return [
            piece
            for i in range(COMMON)
            for piece in [(marks[i], False), *spaced(page, words.take(common[:, i : i + 1]))]
        ]

    before = head
    if task.example:
        entries, common, _ = listed(*((40, 10, 3) if _is_long(task) else (20, 3, 1)), None)
        before = cat(head, entries, page.text(ask), *(piece for piece, _ in solved(common)), page.text("\n"), head)
    often, seldom = (30, 3) if _is_long(task) else (6, 1)
    question = page.text(ask)
    # What the answer takes is known only when the list is: the longest words are allowed for.
    given = cat(before, question, *marks).size.sum(1, keepdim=True) + COMMON * int(words.size.max())
    room = task.length + 1 - given.expand(batch, 1)
    most = int(room.max()) - COMMON * often * (int(words.size.min()) + 3)
    count = min(len(table), max(COMMON + 1, COMMON + most // (seldom * (int(words.size.min()) + 3))))
    entries, common, begin = listed(count, often, seldom, room)
    answer = solved(common)
    fact = before.start.shape[1] + 3 * begin
    return Story([before, entries, question], answer, fact, spellings.to(device)[common])


def frequent_words(task: Ruler, page: Page, batch: int, generator: torch.Generator) -> Story:
    """The coded text, and the question for its three most frequent words."""
    device = page.device
    head = page.text("Read the coded text below and track how often each coded word appears in it.")
    question = page.text(
        "\nQuestion: Leave out the dots '...'. What are the three most frequent words in the coded text above? "
        "Answer: In the coded text above, the three most frequent words are:"
    )
    vocabulary = max(4, task.length // (50 * (BYTES if page.codec.is_bytes else 1)))
    number = distinct(batch, vocabulary, 26**CODED, generator, device)
    codes = letters(number, CODED, string.ascii_lowercase)
    words = page.spell(F.pad(codes, (1, 0), value=SPACE))
    longest = int(words.size.max())
    room = task.length + 1 - int(cat(head, question).size.sum()) - 3 * longest
    most = bisect_right(range(task.length), room // longest, key=lambda n: int(zeta_counts(n, vocabulary).sum()))
    counts = zeta_counts(max(most - 1, 0), vocabulary)
    if not counts[1] > counts[2] > counts[3] > 0:
        raise InputError(f"length {task.length} is too short for fwe, where frequencies have to differ: use 1024")
    each = torch.arange(vocabulary).repeat_interleave(counts).to(device)
    order = torch.rand(batch, len(each), generator=generator, device=device).argsort(1)
    dots = page.text(" ...").take(torch.zeros(batch, 1, dtype=torch.int64, device=device))
    names = cat(dots, Pieces(words.start[:, 1:], words.size[:, 1:]))
    shuffled = each[order]
    answer = one_by_one(page, [names.take(torch.full((batch, 1), i, device=device)) for i in (1, 2, 3)], "")
    fact = 1 + (shuffled == 1).int().argmax(1)
    return Story([head, names.take(shuffled), question], answer, fact, codes[:, 1:4])


def _is_long(task: Ruler) -> bool:
    """Whether the published sizes for 4,096 tokens and more hold."""
    return task.length >= 4096 * (BYTES if task.codec.is_bytes else 1)


@lru_cache
def _words(part: Part) -> tuple[tuple[str, ...], Tensor]:
    """Words of common words extraction, a space before each, and their ASCII codes [words, L]."""
    table = (*adjectives(part), *nouns(part))
    width = max(map(len, table))
    return tuple(f" {word}" for word in table), torch.tensor([list(w.ljust(width, "\0").encode()) for w in table])


def zeta_counts(total: int, vocabulary: int) -> Tensor:
    """How often each of the words is shown, by rank, [vocabulary]: those of a zeta distribution, rounded down."""
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    exponent = torch.tensor(ALPHA, dtype=torch.float64)
    return (total * rank**-ALPHA / torch.special.zeta(exponent, torch.tensor(1.0, dtype=torch.float64))).long()


def read_common_words(text: str) -> list[str]:
    """The words that the list of a prompt repeats most, in order of first place."""
    text = text[text.rindex("Below is a numbered list") : text.rindex("\nQuestion: ")]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", text))  # in the order in which words appear
    often = sorted(counts.values())[-COMMON]
    return [f" {word}" for word, count in counts.items() if count >= often]


def read_frequent_words(text: str) -> list[str]:
    """The three most frequent words of a prompt's coded text, but for the dots."""
    text = text[text.rindex("appears in it.") + 14 : text.rindex("\nQuestion: ")]
    counts = Counter(word for word in text.split() if word != "...")
    return [f" {word}" for word, _ in counts.most_common(3)]
