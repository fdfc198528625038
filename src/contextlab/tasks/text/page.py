"""Prompts put together from pieces of text, all prompts of a batch at once, and scored on the answer at their end."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.text import Reader
from contextlab.prompt import Learner, Prompt
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.text.codec import Codec, codec
from contextlab.tasks.text.corpus import Corpus, load

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


@dataclass(frozen=True)
class AnswerTask(TokenTask):
    """Base: a long text and a question, then the answer, which is fed back token by token and scored.

    Subclasses define `compose`, `read`, the field `tokenizer`, and `width` where all prompts are of one length. Next to
    the errors of token tasks there is `prompt_error`: 1 in a whole prompt unless every token of its answer is right,
    which is the case exactly when greedy generation gives that answer. `ask`, `references` and `match` score generated
    text.

    Pieces are encoded one by one and cut at spaces and at punctuation, so that tokenizers that split text there give
    the ids that they give for the whole prompt.
    """

    asked: ClassVar[int] = 1
    """Facts that the question asks for: the examples that `shot` counts."""

    def __post_init__(self) -> None:
        check_options(self)
        self.codec.require(self.alphabet())
        self.sample(8, torch.Generator().manual_seed(0))

    @property
    def codec(self) -> Codec:
        return codec(self.tokenizer)  # type: ignore[attr-defined]

    @property
    def input_size(self) -> int:
        return self.codec.size

    @abstractmethod
    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw what the prompts say."""

    @abstractmethod
    def read(self, text: str) -> list[str]:
        """The strings that answer a prompt, from its text up to the answer: an exact solution, for the learner.

        See `learners.text.Reader`; none when the text has no answer.
        """

    def alphabet(self) -> str:
        """Symbols that scored answers are made of."""
        return DIGITS

    def context(self, device: torch.device | str) -> Corpus | None:
        """The corpus that the page begins with."""
        return None

    def width(self) -> int | None:
        """Tokens of a prompt; None for as many as the longest of the batch needs."""
        return None

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs and targets (the inputs one later) [batch, T] int64; the answer's tokens are scored.

        `hidden` holds "fact" and "question" [batch], the places of what is asked for and of the question, and
        "references", see `Story`.
        """
        page = Page(self.codec, device, self.context(device))
        story = self.compose(page, batch, generator)
        columns = [*((pieces, False) for pieces in story.parts), *story.answer]
        pieces = cat(*(pieces for pieces, _ in columns))
        counts = torch.tensor([scored for column, scored in columns for _ in range(column.start.shape[1])])
        offset = pieces.size.cumsum(1) - pieces.size
        end = offset[:, -1] + pieces.size[:, -1]
        width = int(end.max()) - 1 if (width := self.width()) is None else width
        if (longest := int(end.max()) - 1) > width:
            raise InputError(f"length {width} is too short: these prompts take {longest} tokens; use {longest} or more")
        # What is as large as the prompts is held in 32 and in 8 bits: moving memory is most of the work.
        place = torch.arange(width + 1, device=device, dtype=torch.int32)
        index = _steps(pieces.start - offset, offset, width + 1, torch.int32).add_(place)
        answer = _steps(counts.to(device).expand_as(offset), offset, width + 1, torch.int8).bool()
        past = place >= end.unsqueeze(1)  # nothing is scored there
        filling = int(page.text("\n").start[0, 0])
        tokens = page.ids[index.masked_fill_(past, filling)].long()
        hidden = {
            "fact": offset.gather(1, story.fact.unsqueeze(1)).squeeze(1),
            "question": offset[:, sum(each.start.shape[1] for each in story.parts[:-1])],
            "references": story.references,
        }
        shot = torch.tensor(self.asked, device=device).expand(batch, width)
        return Prompt(tokens[:, :-1], tokens[:, 1:], answer.logical_and_(~past)[:, 1:], shot, hidden=hidden)

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """accuracy and cross_entropy of each token, and prompt_error, [B, T]."""
        found = super().errors(prediction, prompt)
        wrong = ((found["accuracy"] < 1) & prompt.scored).any(1, keepdim=True)
        return {**found, "prompt_error": wrong.float().expand_as(prompt.scored)}

    def chance(self) -> Mapping[str, float]:
        """Guessing evenly among the symbols of answers; among all tokens when they are not bytes."""
        symbols = len(set(self.alphabet().encode())) if self.codec.is_bytes else self.output_size
        return {"accuracy": 1 / symbols, "cross_entropy": math.log(symbols)}

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "distance": tokens from the beginning of what is asked for to the prediction."""
        found = super().facets(prompt)
        assert prompt.hidden is not None
        return {**found, "distance": (found["position"] - prompt.hidden["fact"].unsqueeze(1)).clamp_min(0)}

    def learners(self) -> dict[str, Learner]:
        """`reader`, which parses the prompt and makes no error."""
        return {"reader": Reader(self.output_size, self.read, self.codec)}

    def symbol(self, token: int) -> str:
        """A token's text."""
        return self.codec.decode([token])

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The text, with the answer in brackets."""
        places = prompt.scored[row].nonzero().squeeze(1).tolist()
        answer = self.codec.decode(prompt.targets[row, places[0] : places[-1] + 1].tolist())
        return f"{self.codec.decode(self.ask(prompt, row).tolist())}[{answer}]"

    def ask(self, prompt: Prompt, row: int = 0) -> Tensor:
        """The ids that a model is to continue with the answer, [t]."""
        return prompt.inputs[row, : int(prompt.scored[row].int().argmax()) + 1]

    def references(self, prompt: Prompt, row: int = 0) -> list[str]:
        """The strings that a generated answer must hold."""
        assert prompt.hidden is not None
        rows = prompt.hidden["references"][row].tolist()
        return [bytes(codes).decode().rstrip("\0") for codes in rows if any(codes)]

    def match(self, answers: Sequence[str], prompt: Prompt) -> list[float]:
        """The share of its references that each generated text holds, whatever their case or order; one text a row."""
        found = []
        for row, answer in enumerate(answers):
            wanted = self.references(prompt, row)
            found.append(sum(each.lower() in answer.lower() for each in wanted) / len(wanted))
        return found


@dataclass(frozen=True)
class FilledTask(AnswerTask):
    """Base: facts in a text that has nothing to do with them, as much of it as makes `length` tokens.

    Subclasses add the fields `length`, `corpus` and `part`.
    """

    unbounded: ClassVar[tuple[str, ...]] = ("length",)

    def context(self, device: torch.device | str) -> Corpus:
        """The documents that the text around the facts is taken from."""
        return load(self.corpus, self.part, self.codec).to(device)  # type: ignore[attr-defined]

    def width(self) -> int:
        """`length`."""
        length: int = self.length  # type: ignore[attr-defined]
        return length

    def fill(
        self,
        page: Page,
        generator: torch.Generator,
        before: Pieces,
        facts: Sequence[Pieces],
        depths: Tensor,
        after: Pieces,
        answer: list[tuple[Pieces, bool]],
    ) -> tuple[list[Pieces], Tensor]:
        """The parts of a story with text between the facts, and the number of pieces before each fact, [n].

        facts: the pieces of each of n facts. depths: [B, n] in 0 .. 1, rising: where in the text each fact stands, at
        the nearest beginning of a line before that.
        """
        corpus = page.corpus
        assert corpus is not None
        batch = len(depths)
        given = cat(before, *facts, after, *(pieces for pieces, _ in answer)).size.sum(1)
        room = (self.width() + 1 - given).expand(batch)
        if int(room.min()) < 1:
            need = self.width() + 1 - int(room.min())
            raise InputError(
                f"length {self.width()} leaves no room for text: facts and question take {need} tokens; use {need + 64}"
                " or more"
            )
        start = corpus.line_start(corpus.windows(batch, int(room.max()), generator))
        cuts = corpus.line_start(start.unsqueeze(1) + (depths * room.unsqueeze(1)).long())
        cuts = torch.maximum(cuts, start.unsqueeze(1))
        edges = torch.cat([start.unsqueeze(1), cuts, (start + room).unsqueeze(1)], 1)
        parts, places, count = [before], [], before.start.shape[1]
        for i, fact in enumerate(facts):
            parts += [Pieces(edges[:, i : i + 1], edges[:, i + 1 : i + 2] - edges[:, i : i + 1]), fact]
            places.append(count := count + 1)
            count += fact.start.shape[1]
        parts += [Pieces(edges[:, -2:-1], edges[:, -1:] - edges[:, -2:-1]), after]
        return parts, torch.tensor(places, device=page.device)


def _steps(values: Tensor, offset: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[B, width]: at each place the value of the last piece that begins there or before. values, offset: [B, P]."""
    values = values.to(dtype)
    change = torch.diff(values, dim=1, prepend=torch.zeros_like(values[:, :1]))
    # Pieces of no size begin where the next one does: their changes add up to the next one's value.
    steps = values.new_zeros(len(values), width + 1)
    return steps.scatter_add_(1, offset.clamp_max(width), change).cumsum(1, dtype=dtype)[:, :width]


def digits(number: Tensor, width: int) -> Tensor:
    """The ASCII codes of a number's last `width` digits, [..., width]."""
    return letters(number, width, DIGITS).flip(-1)


def random_codes(
    shape: tuple[int, ...], symbols: str, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """ASCII codes [*shape] of symbols drawn evenly, int64."""
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
