"""Aggregation over a long list: an answer that depends on every line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from contextlab.prompt import Task
from contextlab.registry import register
from contextlab.tasks.text.base import AnswerTask
from contextlab.tasks.text.page import Page, Story, after_space, distinct, interleave, letters, numerals

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HEAD = "A list of players and their points:\n"
QUESTIONS = {
    "sum": "What is the sum of all points?",
    "max": "What is the largest number of points?",
    "min": "What is the smallest number of points?",
    "count": "How many players have more than 54 points?",
}
LOW, HIGH, MIDDLE = 10, 100, 54


@register(
    "task", "list_aggregation", family="text", papers=(), cases=({"entries": 10}, {"entries": 6, "operation": "sum"})
)
@dataclass(frozen=True)
class ListAggregation(AnswerTask):
    """A list of names and numbers, then a question about the whole list: sum, largest, smallest, or how many above.

    Names are three capital letters, all names different, numbers two digits drawn uniformly (10 to 99). Where one
    needle answers a look-up, here every line counts: error grows with the list, and a line that is not read shifts the
    sum.

    entries: lines of the list.
    operation: "sum", "max", "min", or "count" of the numbers above 54, half of them on average.
    tokenizer: null for bytes, a folder with tokenizer.json, a Hugging Face hub name, or an object (encode, decode).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"entries": 8},
        "hard": {"entries": 1000, "operation": "sum"},
    }

    entries: Annotated[int, Field(ge=2, le=10_000)] = 60
    operation: Literal["sum", "max", "min", "count"] = "max"
    tokenizer: Any = None

    def width(self) -> int | None:
        """Lines and answers of bytes are as long as each other, but for the sum's and the count's last digits."""
        if not self.codec.is_bytes:
            return None
        most = {"sum": (HIGH - 1) * self.entries, "count": self.entries}.get(self.operation, HIGH - 1)
        text = f"{HEAD}\nQuestion: {QUESTIONS[self.operation]}\nAnswer: {most}"
        return len(text) + self.entries * len("ABC: 10\n") - 1

    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw names and numbers."""
        device, n = page.device, self.entries
        names = page.spell(letters(distinct(batch, n, len(LETTERS) ** 3, generator, device), 3, LETTERS))
        number = torch.randint(LOW, HIGH, (batch, n), generator=generator, device=device)
        table = page.text(*(f" {i}" for i in range(LOW, HIGH)))
        lines = interleave(names, page.text(":"), table.take(number - LOW), page.text("\n"))
        answer = {
            "sum": number.sum(1, keepdim=True),
            "max": number.amax(1, keepdim=True),
            "min": number.amin(1, keepdim=True),
            "count": (number > MIDDLE).sum(1, keepdim=True),
        }[self.operation]
        codes = numerals(answer, 7)
        fact = torch.ones(batch, dtype=torch.int64, device=device)  # the list: all of it is asked for
        question = page.text(f"\nQuestion: {QUESTIONS[self.operation]}\nAnswer:")
        return Story([page.text(HEAD), lines, question], after_space(page, codes), fact, codes)

    def read(self, text: str) -> list[str]:
        """The answer to the question, worked out."""
        found = [int(each) for each in re.findall(r"[A-Z]{3}: (\d+)\n", text)]
        above = sum(each > MIDDLE for each in found)
        answer = {"sum": sum(found), "max": max(found), "min": min(found), "count": above}[self.operation]
        return [f" {answer}"]

    def splits(self) -> dict[str, Task]:
        """'train', and lists of half, twice and four times the lines."""
        others = (max(2, self.entries // 2), 2 * self.entries, 4 * self.entries)
        return {"train": self, **{f"entries={n}": self.replace(entries=n) for n in others if n <= 10_000}}
