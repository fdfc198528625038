"""Logic-grid puzzles ("Einstein's puzzle"): who lives where, from clues that leave one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.logic_puzzle import (
    BLANK,
    CLUE,
    CLUES,
    EQUALS,
    HOUSE,
    MOST_ATTRIBUTES,
    MOST_HOUSES,
    MOST_TABLES,
    PAIRS,
    VALUES,
    VOCABULARY,
    Attributes,
    Clue,
    Houses,
    PuzzlePosterior,
    all_tables,
    check_size,
    fitting,
    pack,
)
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask
from contextlab.tasks.composition import Part, kept, with_solved

EAGER: dict[Clue, float] = {"found_at": 0.75, "same_house": 0.75, "direct_left": 1.0, "besides": 1.2}
"""How eagerly a clue of each kind is left out, as in the paper's code."""
WORDS: dict[Clue, str] = {
    "found_at": "in",
    "same_house": "with",
    "direct_left": "directly-left-of",
    "besides": "beside",
}
HELD = 2**16
"""Words of bits that are worked on at once; few enough for a processor's cache."""


@register(
    "task",
    "logic_puzzle",
    family="languages",
    papers=("2305.18654",),
    cases=(
        {"houses": 3, "attributes": 2},
        {"houses": 3, "attributes": 3, "clues": ("direct_left", "same_house"), "left_out": 1},
    ),
)
@dataclass(frozen=True)
class LogicPuzzle(TokenTask):
    """Clues about houses in a row, then the table that they leave (Einstein's puzzle of Faith and Fate, 2305.18654).

    Each of K houses has another value of each of M attributes. A clue is three tokens: an item (a value of an
    attribute), how it stands to what follows, and a house ("found_at") or another item: in its house ("same_house"),
    in the house directly left of it ("direct_left"), or next to it on either side ("besides"). After `=` come the
    table's items, house by house; all are scored. Clues stand in random order, with blanks before them where there are
    fewer than there is room for.

    As in the paper's public code, all true clues are offered (of a pair of neighbouring items the one kind or the
    other), and clues are left out as long as one table fits, so that each that is left is needed. There, many are
    tried at once at first; here one after another, in an order drawn with the code's weights. The code offers each
    "same_house" twice, and puts the left item of "besides" first, which tells more than the clue; here items of
    symmetric clues come in random order. Without "found_at" both kinds are offered of neighbouring items. Puzzles with
    more clues than there is room for are drawn again. The prompts there are text. Ids are the same for all sizes.

    A cell's "depth" is its step in the code's greedy elimination: each step takes the clue that settles the most
    cells, or where none settles any the fewest that do together (of these the best; the code takes the first).
    It is 0 for what the clues leave open.

    Tables whose orders (one an attribute, numbered from 0) sum to -1 modulo how many there are are the test part.

    houses: K, in a row.
    attributes: M of each house; there are (K!)^M tables, which can be 524,288 at most.
    clues: kinds that are offered, "found_at" or "direct_left" among them: others fit the mirror image, too.
    left_out: needed clues that are not shown; then several tables fit, and one of them is the answer.
    part: "train" or "test".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"houses": 3, "attributes": 2},
        "hard": {"houses": 4, "attributes": 4},
    }

    houses: Houses = 4
    attributes: Attributes = 3
    clues: tuple[Clue, ...] = CLUES
    left_out: NonNegativeInt = 0
    part: Part = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.houses, self.attributes)
        if not {"found_at", "direct_left"} & set(self.clues):
            raise InputError("these clues fit a table and its mirror image alike; add 'found_at' or 'direct_left'")
        if self.left_out >= self.slots:
            raise InputError(
                f"left_out {self.left_out} leaves no clue of the {self.slots} that there is room for; "
                f"at most {self.slots - 1}"
            )

    @property
    def cells(self) -> int:
        """Cells of a table."""
        return self.houses * self.attributes

    @property
    def slots(self) -> int:
        """Clues that there is room for: one more than "found_at" alone takes, which few puzzles do not fit."""
        return (self.houses - 1) * self.attributes + 1

    @property
    def problem(self) -> int:
        """Tokens before the answer."""
        return 3 * self.slots + 1

    @property
    def input_size(self) -> int:
        return VOCABULARY

    def symbol(self, token: int) -> str:
        """An item's name, a house's number, how items stand, =, or a dot for a blank."""
        if token < HOUSE:
            return VALUES[token // MOST_HOUSES][token % MOST_HOUSES]
        if token < CLUE:
            return f"house-{token - HOUSE + 1}"
        return WORDS[CLUES[token - CLUE]] if token < EQUALS else {EQUALS: "=", BLANK: "."}[token]

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """A clue a line, then the answers in brackets, a house a line."""
        clues = prompt.inputs[row, : 3 * self.slots].unflatten(0, (-1, 3)).tolist()
        lines = [" ".join(map(self.symbol, clue)) for clue in clues if clue[1] != BLANK]
        answer = [f"[{self.symbol(token)}]" for token in prompt.targets[row, 3 * self.slots :].tolist()]
        for house in range(self.houses):
            cells = answer[house * self.attributes : (house + 1) * self.attributes]
            lines.append(f"house-{house + 1}: {' '.join(cells)}")
        return "\n".join(lines)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw puzzles with their tables, [batch, 3 slots + 1 + K M - 1] tokens."""
        tokens, many = self._draw(batch, generator, device)
        while many.any():
            (again,) = many.nonzero(as_tuple=True)
            tokens[again], many[again] = self._draw(len(again), generator, device)
        scored = torch.arange(tokens.shape[1] - 1, device=tokens.device) >= self.problem - 1
        scored = scored.expand(batch, -1).clone()
        return Prompt(tokens[:, :-1], tokens[:, 1:], scored, torch.zeros_like(tokens[:, 1:]))

    def _draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Whole sequences [batch, problem + K M], and whether the puzzle has too many clues [batch].

        The clues are found for table 0; then the values are renamed, which makes any table the answer.
        """

        def rand(*shape: int) -> Tensor:
            return torch.rand(batch, *shape, generator=generator, device=device)

        orders = math.factorial(self.houses)
        order = torch.randint(orders, (batch, self.attributes), generator=generator, device=device)
        order[:, -1] = kept(order[:, :-1].sum(1), orders, generator, self.part)
        table = all_tables(self.houses, 1, str(device))[order, 0].long()  # [B, M, K]
        table += MOST_HOUSES * torch.arange(self.attributes, device=device).unsqueeze(1)

        offers = true_clues(self.clues, self.houses, self.attributes).to(device)
        eager = torch.tensor([EAGER[clue] for clue in CLUES], device=device)[offers[:, 0]]
        turn = -(1 - rand(len(offers))).log() / eager  # when a clue is tried: exponential with its rate
        if set(self.clues) >= {"found_at", "direct_left", "besides"}:
            left = (offers[:, 0] == CLUES.index("direct_left")).nonzero().squeeze(1)  # its rival is the one after it
            turn.scatter_(1, left + (rand(len(left)) < 0.5).long(), -1.0)  # not offered, so never needed
        needed = self._needed(turn.argsort(1), offers)

        # The needed clues in random order, at the end of the room; the last of them may be left out.
        place = torch.where(needed, rand(len(offers)), -1.0).sort(1)
        many = needed.sum(1) > self.slots
        chosen, there = place.indices[:, -self.slots :], place.values[:, -self.slots :] >= 0
        clue, first, second = offers[chosen].unbind(2)
        items = table.flatten(1)
        second = torch.where(clue == CLUES.index("found_at"), second + HOUSE, items.gather(1, second))
        first = items.gather(1, first)
        symmetric = (clue == CLUES.index("same_house")) | (clue == CLUES.index("besides"))
        swapped = symmetric & (rand(self.slots) < 0.5)
        shown = torch.stack([torch.where(swapped, second, first), clue + CLUE, torch.where(swapped, first, second)], 2)
        shown = torch.where(there.unsqueeze(2), shown, BLANK)
        shown = F.pad(shown, (0, 0, self.left_out, 0), value=BLANK)[:, : self.slots].flatten(1)
        return torch.cat([shown, torch.full_like(shown[:, :1], EQUALS), table.mT.flatten(1)], 1), many

    def _needed(self, order: Tensor, offers: Tensor) -> Tensor:
        """The clues that are left when one after another, in this order, is left out if table 0 is the only one that
        fits the rest. order: [B, C]. Returns bool [B, C] by the clue's number."""
        number = torch.arange(math.factorial(self.houses) ** self.attributes, device=order.device)
        only, every, bits = pack(number == 0), pack(number >= 0), self._bits(offers)
        count, parts = order.shape[1], []
        for rows in order.split(max(1, HELD // bits.shape[1])):
            later = [every.expand(len(rows), -1)]  # what fits the last clues: none of them, one, two, ...
            while (later[-1] != only).any():
                later.append(later[-1] & bits[rows[:, count - len(later)]])
            fits, needed = later[0], torch.zeros_like(rows, dtype=torch.bool)
            for i in range(count - len(later) + 1, count):  # those before are not needed
                needed[:, i] = (fits & later[count - i - 1] != only).any(1)
                fits = torch.where(needed[:, i : i + 1], fits & bits[rows[:, i]], fits)
            parts.append(torch.zeros_like(needed).scatter_(1, rows, needed))
        return torch.cat(parts)

    def _bits(self, clues: Tensor) -> Tensor:
        """The tables that fit clues [..., 3] of kind and numbers, [..., words]."""
        size, device = (self.houses, self.attributes), str(clues.device)
        bits = torch.empty(0)
        for number, clue in enumerate(CLUES):
            known = fitting(clue, *size, device)
            if number == 0:
                bits = known.new_zeros(*clues.shape[:-1], known.shape[2])
            told = clues[..., 0] == number
            bits[told] = known[clues[..., 1][told], clues[..., 2][told]]
        return bits

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """Also solved: 1 at every token of a prompt whose whole table is right, each cell given those before."""
        return with_solved(super().errors(prediction, prompt), prompt)

    def facets(self, prompt: Prompt) -> dict[str, Tensor]:
        """Also "depth", the step of the greedy elimination that settles the cell, and "clues", how many are shown."""
        clues = prompt.inputs[:, : 3 * self.slots].unflatten(1, (-1, 3))
        depth = F.pad(self._depth(clues, prompt.targets[:, self.problem - 1 :]), (self.problem - 1, 0))
        shown = (clues[..., 1] != BLANK).sum(1, keepdim=True).expand(-1, prompt.length)
        return {**super().facets(prompt), "depth": depth, "clues": shown}

    def _depth(self, clues: Tensor, answer: Tensor) -> Tensor:
        """clues: tokens [B, slots, 3]; answer: [B, K M]. Returns [B, K M]."""
        items = answer.unflatten(1, (self.houses, self.attributes)).mT.flatten(1)  # attribute by attribute
        houses = torch.arange(self.houses, device=clues.device).repeat(self.attributes).expand_as(items)
        house = torch.zeros(len(items), HOUSE, dtype=torch.int64, device=clues.device).scatter_(1, items, houses)
        there = clues[..., 1] != BLANK
        shown = int(there.sum(1).max())
        clues, there = clues[:, self.slots - shown :], there[:, self.slots - shown :]
        kind = torch.where(there, clues[..., 1] - CLUE, 0)
        # As numbers of items and of houses in table 0, of which the answer is a renaming.
        number = [
            item // MOST_HOUSES * self.houses + house.gather(1, item)
            for item in torch.where(there.unsqueeze(2) & (clues < HOUSE), clues, 0)[..., ::2].unbind(2)
        ]
        second = torch.where(kind == CLUES.index("found_at"), clues[..., 2] - HOUSE, number[1])
        told = torch.stack([kind, number[0], torch.where(there, second, 0)], 2)
        rows = max(1, PAIRS // max(math.factorial(self.houses) ** self.attributes, 2**shown * self.cells))
        parts = zip(told.split(rows), there.split(rows), strict=True)
        return torch.cat([self._steps(self._settled(*part)) for part in parts])

    def _settled(self, clues: Tensor, there: Tensor) -> Tensor:
        """Whether each choice of the clues [B, n, 3] settles each cell, [B, 2^n, K M]; bit i of a choice is clue i."""
        count, orders = clues.shape[1], all_tables(self.houses, 1, str(clues.device))[:, 0]
        tables = len(orders) ** self.attributes
        shift = torch.arange(8, dtype=torch.uint8, device=clues.device)
        excluded = torch.zeros(len(clues), tables, dtype=torch.int32, device=clues.device)  # by which clues
        for i in range(count):
            fits = (self._bits(clues[:, i]).view(torch.uint8).unsqueeze(2) >> shift & 1).flatten(1)[:, :tables]
            excluded += ((1 - fits) * there[:, i : i + 1]).int() << i
        false = orders != torch.arange(self.houses, device=clues.device)  # [K!, K]
        number, parts = torch.arange(tables, device=clues.device), []
        for attribute in range(self.attributes):  # a cell of it is open where a table with a false order is left
            order = number // len(orders) ** attribute % len(orders)
            found = torch.zeros(len(clues), len(orders) * 2**count, dtype=torch.bool, device=clues.device)
            found = found.scatter_(1, excluded + 2**count * order, True).unflatten(1, (len(orders), -1))
            parts.append(torch.stack([found[:, false[:, house]].any(1) for house in range(self.houses)], 2))
        open_ = torch.stack(parts, 3).flatten(2)
        for i in range(count):  # a table that some clues exclude stays where none of these is chosen
            both = open_.view(len(clues), -1, 2, 2**i, self.cells)
            both[:, :, 1] |= both[:, :, 0]
        return ~open_.flip(1)

    def _steps(self, settled: Tensor) -> Tensor:
        """The step of the greedy elimination at which each cell is settled, [B, K M]."""
        choices = torch.arange(settled.shape[1], device=settled.device)
        bits = (choices.unsqueeze(1) >> torch.arange(settled.shape[1].bit_length(), device=settled.device) & 1).sum(1)
        count, row = settled.sum(2), torch.arange(len(settled), device=settled.device)
        taken = torch.zeros_like(row)
        depth = torch.zeros_like(settled[:, 0], dtype=torch.int64)
        for step in range(1, int(bits.max()) + 1):
            helps = (choices & taken.unsqueeze(1) == taken.unsqueeze(1)) & (count > count[row, taken].unsqueeze(1))
            # The fewest clues more, then the most cells, then the first.
            rank = ((bits - bits[taken].unsqueeze(1)) * (self.cells + 1) - count) * len(choices) + choices
            best = rank.masked_fill(~helps, torch.iinfo(rank.dtype).max).argmin(1)
            taken = torch.where(helps.any(1), best, taken)
            depth = torch.where(settled[row, taken] & (depth == 0), step, depth)
        return depth

    def learners(self) -> dict[str, Learner]:
        """`puzzle_posterior`, which strikes out the tables that the clues exclude."""
        return {"puzzle_posterior": PuzzlePosterior(self.houses, self.attributes, self.slots)}

    def splits(self) -> dict[str, Task]:
        """'train', 'new problems'; a house more, an attribute more, where tables are not too many; one clue left out,
        so that several tables fit."""
        found: dict[str, Task] = {"train": self}
        if self.part == "train":
            found["new problems"] = self.replace(part="test")
        for name, value, most in (
            ("houses", self.houses + 1, MOST_HOUSES),
            ("attributes", self.attributes + 1, MOST_ATTRIBUTES),
        ):
            size = {"houses": self.houses, "attributes": self.attributes, name: value}
            if value <= most and math.factorial(size["houses"]) ** size["attributes"] <= MOST_TABLES:
                found[f"{name}={value}"] = self.replace(**size)
        if not self.left_out:
            found["left_out=1"] = self.replace(left_out=1)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the items; solved: among the tables."""
        tables = math.factorial(self.houses) ** self.attributes
        return {"accuracy": 1 / self.cells, "cross_entropy": math.log(self.cells), "solved": 1 / tables}


@lru_cache(maxsize=32)
def true_clues(clues: tuple[Clue, ...], houses: int, attributes: int) -> Tensor:
    """All clues of these kinds that are true of table 0, [C, 3]: the kind's number, then as in `fitting`; "besides"
    stands after the "direct_left" of the same items."""
    here = [[a * houses + h for a in range(attributes)] for h in range(houses)]  # the items of each house
    found = [("found_at", item, h) for h, items in enumerate(here) for item in items]
    found += [("same_house", *pair) for items in here for pair in combinations(items, 2)]
    for left, right in pairwise(here):
        found += [(clue, *pair) for pair in product(left, right) for clue in ("direct_left", "besides")]
    return torch.tensor([(CLUES.index(clue), *numbers) for clue, *numbers in found if clue in clues])
