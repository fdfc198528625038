"""Prompts put together from pieces of text, all prompts of a batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.tasks.text.codec import Codec
from contextlab.tasks.text.corpus import Corpus

SPACE = 32
DIGITS = "0123456789"
HEX = "0123456789abcdef"


@dataclass
class Pieces:
    """Ranges of a page's ids. start, size: [B, n], or [1, n] where all prompts have the same."""

    start: Tensor
    size: Tensor

    def take(self, index: Tensor) -> Pieces:
        """Pieces [B, k] by their number. index: [B, k], into the n of a table [1, n] or of each row [B, n]."""
        if self.start.shape[0] == 1:
            return Pieces(self.start[0, index], self.size[0, index])
        return Pieces(self.start.gather(1, index), self.size.gather(1, index))

    def where(self, kept: Tensor) -> Pieces:
        """The same, empty where `kept`, [B, n] bool, is False."""
        return Pieces(self.start.expand(kept.shape), torch.where(kept, self.size, 0))


def cat(*columns: Pieces) -> Pieces:
    """One after another along n; all prompts' pieces are as many."""
    batch = max(column.start.shape[0] for column in columns)
    start, size = (
        torch.cat([part.expand(batch, -1) for part in parts], 1)
        for parts in ([c.start for c in columns], [c.size for c in columns])
    )
    return Pieces(start, size)


def interleave(*columns: Pieces) -> Pieces:
    """Entries of several pieces each: the first of every column, then the second of every column, and so on."""
    starts = torch.broadcast_tensors(*[c.start for c in columns])
    sizes = torch.broadcast_tensors(*[c.size for c in columns])
    return Pieces(torch.stack(starts, 2).flatten(1), torch.stack(sizes, 2).flatten(1))


class Page:
    """The ids that a batch of prompts is put together from: a corpus, fixed texts, and strings drawn for the batch."""

    def __init__(self, codec: Codec, device: torch.device | str, corpus: Corpus | None = None) -> None:
        self.codec, self.device, self.corpus = codec, device, corpus
        self._chunks: list[Tensor] = []
        self._length = 0
        if corpus is not None:
            self._add(corpus.tokens)  # first, so that places in the corpus are places on the page

    def _add(self, ids: Tensor) -> int:
        begin = self._length
        self._chunks.append(ids)
        self._length += len(ids)
        return begin

    @property
    def ids(self) -> Tensor:
        """All ids that pieces refer to, [n]: uint8 of bytes, int32 of words."""
        kind = torch.uint8 if self.codec.is_bytes else torch.int32
        return torch.cat([chunk.to(kind) for chunk in self._chunks])

    def text(self, *texts: str) -> Pieces:
        """Fixed texts, [1, n]."""
        parts = self.codec.encode_all(texts)
        size = torch.tensor([len(part) for part in parts], device=self.device)
        begin = self._add(torch.tensor([token for part in parts for token in part], device=self.device))
        return Pieces((begin + size.cumsum(0) - size).unsqueeze(0), size.unsqueeze(0))

    def spell(self, codes: Tensor) -> Pieces:
        """Strings drawn for this batch, [B, n]. codes: [B, n, L] int64, ASCII, zeros after the last."""
        shape, width = codes.shape[:-1], codes.shape[-1]
        if self.codec.is_bytes:
            begin = self._add(codes.flatten())
            start = begin + width * torch.arange(math.prod(shape), device=self.device)
            return Pieces(start.view(shape), (codes > 0).sum(-1))
        strings = bytes(codes.flatten().tolist()).decode("ascii")
        found = self.text(*(strings[i : i + width].rstrip("\0") for i in range(0, len(strings), width)))
        return Pieces(found.start.view(shape), found.size.view(shape))


@dataclass
class Story:
    """What prompts are made of, in order.

    parts: what is read; the last is the question. answer: (pieces, whether they are scored) that follow it. fact: [B],
    how many of the pieces of `parts` stand before the fact that is asked for. references: [B, K, L] int64, ASCII codes
    of the strings that an answer must hold, filled up with zeros.
    """

    parts: list[Pieces]
    answer: list[tuple[Pieces, bool]]
    fact: Tensor
    references: Tensor


def digits(number: Tensor, width: int) -> Tensor:
    """The ASCII codes of a number's last `width` digits, [..., width]."""
    return letters(number, width, DIGITS).flip(-1)


def random_codes(
    shape: tuple[int, ...], symbols: str, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """ASCII codes [*shape] of symbols drawn uniformly, int64."""
    table = torch.tensor(list(symbols.encode()), device=device)
    return table[torch.randint(len(symbols), shape, generator=generator, device=device)]


def distinct(batch: int, count: int, high: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """[batch, count] whole numbers below `high`, no two of a row the same, all such rows equally likely."""
    if count * count > high:  # hardly a row would have no two alike
        return torch.rand(batch, high, generator=generator, device=device).topk(count, 1).indices
    drawn = torch.randint(high, (batch, count), generator=generator, device=device)
    while count > 1 and (again := (drawn.sort(1).values.diff(dim=1) == 0).any(1)).any():
        drawn[again] = torch.randint(high, (int(again.sum()), count), generator=generator, device=device)
    return drawn


def letters(number: Tensor, width: int, symbols: str) -> Tensor:
    """The ASCII codes of a number written with `symbols` as digits, [..., width]."""
    powers = len(symbols) ** torch.arange(width, device=number.device)
    table = torch.tensor(list(symbols.encode()), device=number.device)
    return table[number.unsqueeze(-1) // powers % len(symbols)]


def uuids(shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str) -> Tensor:
    """The ASCII codes of random UUIDs (version 4), [*shape, 36]."""
    codes = random_codes((*shape, 36), HEX, generator, device)
    codes[..., [8, 13, 18, 23]] = ord("-")
    codes[..., 14] = ord("4")
    codes[..., 19] = random_codes(shape, "89ab", generator, device)
    return codes


def after_space(page: Page, codes: Tensor) -> list[tuple[Pieces, bool]]:
    """Answers after a space, which is not scored where it is a token of its own. codes: [B, 1, L], see `Page.spell`."""
    if page.codec.is_bytes:
        return [(page.text(" "), False), (page.spell(codes), True)]
    return [(page.spell(F.pad(codes, (1, 0), value=SPACE)), True)]


def numerals(number: Tensor, width: int) -> Tensor:
    """ASCII codes of whole numbers, with zeros after the last digit, [..., width]."""
    size = (number.clamp_min(1).double().log10() + 1e-9).floor().long() + 1
    place = torch.arange(width, device=number.device)
    power = 10 ** (size.unsqueeze(-1) - 1 - place).clamp_min(0)
    return torch.where(place < size.unsqueeze(-1), number.unsqueeze(-1) // power % 10 + ord("0"), 0)


def spaced(page: Page, pieces: Pieces) -> list[tuple[Pieces, bool]]:
    """An answer whose pieces begin with a space, which is not scored where it is a token of its own."""
    if not page.codec.is_bytes:
        return [(pieces, True)]
    space = Pieces(pieces.start, torch.ones_like(pieces.size))
    return [(space, False), (Pieces(pieces.start + 1, pieces.size - 1), True)]
