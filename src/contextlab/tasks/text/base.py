"""What text tasks share: a question about a long text, answered token by token, and filler of any length."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.text import Reader
from contextlab.prompt import Learner, Prompt
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.text.codec import Codec, codec
from contextlab.tasks.text.corpus import Corpus, load
from contextlab.tasks.text.page import DIGITS, Page, Pieces, Story, cat


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
        """Guessing uniformly among the symbols of answers; among all tokens when they are not bytes."""
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
        return self.text([token])

    def text(self, tokens: Sequence[int]) -> str:
        """See `Task.text`."""
        return self.codec.decode(tokens)

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
