"""A needle in a haystack: one fact in a long text that has nothing to do with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt

from contextlab.learners.text import ContextNgram
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.text.base import FilledTask
from contextlab.tasks.text.corpus import PYTHON, Part
from contextlab.tasks.text.page import Page, Pieces, Story, after_space, cat, digits, interleave
from contextlab.tasks.text.wordlist import adjectives, nouns

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def things(page: Page, part: Part, shape: tuple[int, int], generator: torch.Generator) -> Pieces:
    """Names " adjective-noun" of one part, drawn uniformly: [B, 2 n] pieces for n names."""
    first, second = adjectives(part), nouns(part)
    one = torch.randint(len(first), shape, generator=generator, device=page.device)
    two = torch.randint(len(second), shape, generator=generator, device=page.device)
    return interleave(
        page.text(*(f" {each}" for each in first)).take(one), page.text(*(f"-{each}" for each in second)).take(two)
    )


@register(
    "task", "needle", family="text", papers=("2404.06654",), cases=({"length": 256}, {"length": 256, "depth": 0.5})
)
@dataclass(frozen=True)
class Needle(FilledTask):
    """Needle in a haystack: a line that gives a number to a name stands somewhere in a long text; which number is it?

    The haystack is a window of one document of real text, cut to fill the prompt exactly; the needle begins a line. The
    number is seven digits, drawn anew for each prompt, and the name an adjective and a noun, other ones in the
    two parts. `splits` are the usual grid of depth and length. The wording is this library's; RULER's (`ruler`) is the
    published one.

    length: tokens in the prompt.
    depth: where in the text the needle stands, 0 for the beginning and 1 for the end; None draws it uniformly.
    corpus: "python", the sources of the standard library on this machine, or the path of a text file or a folder.
    part: documents and names to draw from, "train" or "test".
    tokenizer: null for bytes, a folder with tokenizer.json, a Hugging Face hub name, or an object (encode, decode).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"easy": {"length": 256}, "hard": {"length": 8192}}

    length: PositiveInt = 1024
    depth: Annotated[float, Field(ge=0, le=1)] | None = None
    corpus: str = PYTHON
    part: Part = "train"
    tokenizer: Any = None

    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw name, number and depth."""
        name = things(page, self.part, (batch, 1), generator)
        number = torch.randint(10**6, 10**7, (batch, 1), generator=generator, device=page.device)
        codes = digits(number, 7)
        depth = torch.rand(batch, 1, generator=generator, device=page.device)
        if self.depth is not None:
            depth = torch.full_like(depth, self.depth)
        spelled = after_space(page, codes)
        fact = cat(
            page.text("The secret number of the"), name, page.text(" is"), *(p for p, _ in spelled), page.text(".\n")
        )
        after = cat(page.text("\nQuestion: what is the secret number of the"), name, page.text("?\nAnswer: it is"))
        parts, places = self.fill(page, generator, page.text(""), [fact], depth, after, spelled)
        return Story(parts, spelled, places.expand(batch), codes)

    def read(self, text: str) -> list[str]:
        """The number in the line about the name that the question asks for."""
        asked = re.search(r"Question: what is the secret number of the ([a-z-]+)\?\nAnswer: it is ?$", text)
        found = asked and re.search(rf"The secret number of the {asked[1]} is (\d+)\.\n", text)
        return [f" {found[1]}"] if found else []

    def learners(self) -> dict[str, Learner]:
        """`reader`, which makes no error; n-grams of the prompt, which find the number only if the words repeat."""
        return {**super().learners(), "6-gram": ContextNgram(self.output_size, 6)}

    def splits(self) -> dict[str, Task]:
        """'train', held-out documents and names, and these by depth and length."""
        found: dict[str, Task] = {"train": self, "documents=test": self.replace(part="test")}
        for length in (self.length, 2 * self.length):
            for depth in DEPTHS:
                name = f"length={length},depth={depth:.0%}"
                found[name] = self.replace(part="test", length=length, depth=depth)
        return found
