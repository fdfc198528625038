"""Logic-grid puzzles: their tokens, all tables as bits, and the learner that strikes out what the clues exclude.

A table says for each attribute which value is in which house. There are (K!)^M for K houses and M attributes; a set of
tables is a row of bits in int64 words, so a clue is one bitwise `and`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

Clue = Literal["found_at", "same_house", "direct_left", "besides"]
CLUES: tuple[Clue, ...] = get_args(Clue)
VALUES: tuple[tuple[str, ...], ...] = (
    ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn"),
    ("red", "blue", "green", "white", "black", "pink"),
    ("cat", "dog", "bird", "horse", "fish", "goat"),
    ("tea", "milk", "coffee", "water", "juice", "cocoa"),
    ("rice", "soup", "bread", "pizza", "salad", "pie"),
    ("rose", "tulip", "lily", "daisy", "iris", "poppy"),
)
"""Of each attribute; the item (a, v) has the id 6 a + v, whatever the size of the puzzle."""
MOST_HOUSES, MOST_ATTRIBUTES = len(VALUES[0]), len(VALUES)
HOUSE = MOST_HOUSES * MOST_ATTRIBUTES
CLUE = HOUSE + MOST_HOUSES
EQUALS, BLANK = CLUE + len(CLUES), CLUE + len(CLUES) + 1
VOCABULARY = BLANK + 1
MOST_TABLES = 2**19
"""Tables that are enumerated at most: 4 houses with 4 attributes, 6 with 2, 2 or 3 with 6."""
PAIRS = 2**22
"""Prompts times tables that are held at once."""

Houses = Annotated[int, Field(ge=2, le=MOST_HOUSES)]
Attributes = Annotated[int, Field(ge=2, le=MOST_ATTRIBUTES)]


def check_size(houses: int, attributes: int) -> None:
    """Raises InputError for puzzles of too many tables."""
    if math.factorial(houses) ** attributes > MOST_TABLES:
        most = int(math.log(MOST_TABLES) / math.log(math.factorial(houses)))
        raise InputError(
            f"attributes {attributes} are too many for houses {houses}: more than {MOST_TABLES} tables; at most {most}"
        )


@lru_cache(maxsize=8)
def all_tables(houses: int, attributes: int, device: str = "cpu") -> Tensor:
    """The value of each attribute in each house, [tables, M, K] int8; table 0 has value h in house h throughout."""
    orders = torch.tensor(list(itertools.permutations(range(houses))), dtype=torch.int8, device=device)
    number = torch.arange(len(orders) ** attributes, device=device).unsqueeze(1)
    return orders[number // len(orders) ** torch.arange(attributes, device=device) % len(orders)]


@lru_cache(maxsize=16)
def fitting(clue: Clue, houses: int, attributes: int, device: str = "cpu") -> Tensor:
    """The tables that agree with each clue of a kind, as bits: [K M, K M or K, words] int64.

    The first place is for item a K + v, the second for the other item, or for the house of "found_at".
    """
    tables = all_tables(houses, attributes, device)
    house = tables.argsort(2).to(torch.int8).flatten(1).T  # where each item is, [K M, tables]
    others = torch.arange(houses, dtype=torch.int8, device=device).unsqueeze(1) if clue == "found_at" else house
    return torch.stack([pack(meets(clue, each, others)) for each in house])


def meets(clue: Clue, first: Tensor, second: Tensor) -> Tensor:
    """Whether items in these houses agree with a clue: bool, of their shape.

    first, second: houses, int64 that broadcast; for "found_at", the second is the house that the clue names.
    """
    if clue in ("found_at", "same_house"):
        return first == second
    return second - first == 1 if clue == "direct_left" else (second - first).abs() == 1


def pack(sets: Tensor) -> Tensor:
    """bool [..., n] as bits [..., words] int64; bits past n are 0."""
    spare = -sets.shape[-1] % 64
    groups = torch.nn.functional.pad(sets, (0, spare)).unflatten(-1, (-1, 8))
    weight = 2 ** torch.arange(8, dtype=torch.uint8, device=sets.device)
    return (groups * weight).sum(-1, dtype=torch.uint8).view(torch.int64)


def members(sets: Tensor) -> tuple[Tensor, Tensor]:
    """Row and number of every bit that is set in [B, words], rows in order."""
    row, byte = (found := sets.view(torch.uint8)).nonzero(as_tuple=True)
    bits = found[row, byte].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=sets.device) & 1
    which, bit = bits.nonzero(as_tuple=True)
    return row[which], 8 * byte[which] + bit


@register(
    "learner",
    "puzzle_posterior",
    family="languages",
    papers=("2305.18654",),
    cases=({"houses": 3, "attributes": 2, "slots": 8},),
)
@dataclass(frozen=True)
class PuzzlePosterior(Learner):
    """All tables that agree with the clues and with the cells so far, each as likely as another.

    Exact where the clues leave one table. Where they leave several it is the best answer known, not Bayes-optimal: a
    generator that leaves out superfluous clues makes some tables likelier than others.

    houses: K of the puzzles.
    attributes: M of the puzzles.
    slots: clues that there is room for in a prompt.
    """

    houses: Houses = 4
    attributes: Attributes = 3
    slots: NonNegativeInt = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.houses, self.attributes)

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, ids], float32; all ids alike before the answer, or where no table agrees."""
        tokens = token_ids(prompt, VOCABULARY, "puzzle_posterior")
        length = 3 * self.slots + self.houses * self.attributes
        if tokens.shape[1] != length:
            raise InputError(
                f"puzzle_posterior for houses {self.houses}, attributes {self.attributes}, slots {self.slots} reads "
                f"{length} tokens; the prompt has {tokens.shape[1]}"
            )
        rows = max(1, PAIRS // math.factorial(self.houses) ** self.attributes)
        return torch.cat([self._predict(part) for part in tokens.split(rows)])

    def _predict(self, tokens: Tensor) -> Tensor:
        row, table = members(self.agreeing(tokens[:, : 3 * self.slots].unflatten(1, (-1, 3))))
        tables = all_tables(self.houses, self.attributes, str(tokens.device))
        even = torch.full((len(tokens), VOCABULARY), 1 / VOCABULARY, dtype=torch.float64, device=tokens.device)
        answers = [even] * (3 * self.slots)
        for cell in range(self.houses * self.attributes):
            house, attribute = divmod(cell, self.attributes)
            value = tables[table, attribute, house] + MOST_HOUSES * attribute
            count = torch.zeros_like(even).index_put_((row, value.long()), even.new_ones(()), accumulate=True)
            total = count.sum(1, keepdim=True)
            answers.append(torch.where(total > 0, count / total.clamp(min=1), even))
            if (at := 3 * self.slots + 1 + cell) < tokens.shape[1]:
                agrees = value == tokens[row, at]
                row, table = row[agrees], table[agrees]
        return ((1 - SMOOTHING) * torch.stack(answers, 1) + SMOOTHING / VOCABULARY).log().float()

    def agreeing(self, clues: Tensor) -> Tensor:
        """The tables that agree with all clues [B, slots, 3] of tokens, as bits [B, words]; what is no clue says
        nothing."""
        size, device = (self.houses, self.attributes), str(clues.device)
        left = pack(torch.ones(math.factorial(self.houses) ** self.attributes, dtype=torch.bool, device=clues.device))
        left = left.repeat(len(clues), 1)
        first, first_there = self._item(clues[..., 0])
        second, second_there = self._item(clues[..., 2])
        house = clues[..., 2] - HOUSE
        for number, clue in enumerate(CLUES):
            other, there = second, second_there
            if clue == "found_at":
                other, there = house, (house >= 0) & (house < self.houses)
            told = (clues[..., 1] == CLUE + number) & first_there & there
            bits = fitting(clue, *size, device)
            for slot in range(self.slots):
                (row,) = told[:, slot].nonzero(as_tuple=True)
                left[row] &= bits[first[row, slot], other[row, slot]]
        return left

    def _item(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """The number a K + v of an item, and whether the token is an item of these puzzles."""
        attribute, value = token // MOST_HOUSES, token % MOST_HOUSES
        return attribute * self.houses + value, (attribute < self.attributes) & (value < self.houses)
